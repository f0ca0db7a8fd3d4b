"""ms-swift's Seq2SeqTrainer on the same work, with its own arguments, model and adapter preparation, template collator and hooks.

    PEER_PYTHON swift_sft.py task.json

The tutorial's collation renders each row in place of swift's template, which resizes pictures with another library, holds the published
tokenizer's image id as a constant, and puts loss on the newline behind the end token.

`grouped` in the task: rows of similar length share a batch, and rows are encoded before the loop, as swift does then. Its packing and padding_free refuse to
run without FlashAttention, which a CPU does not have.
"""

from __future__ import annotations

import os
from typing import Any

import recipe


class Encoded(list[dict[str, Any]]):
    """Encoded rows; `rows["lengths"]` are their tokens, as swift's trainer asks a data set for them. Its collator takes rows apart, so each is a copy."""

    def __getitem__(self, at: Any) -> Any:
        return [len(row["input_ids"]) for row in self] if at == "lengths" else dict(super().__getitem__(at))


def main() -> None:
    task = recipe.task()
    os.environ.setdefault("LOG_LEVEL", "WARNING")
    from swift.arguments import SftArguments
    from swift.dataset import LazyLLMDataset
    from swift.pipelines.train import SwiftSft
    from swift.trainers import Seq2SeqTrainer
    from transformers import set_seed

    args = SftArguments(
        model=task.model,
        model_type="qwen2_vl",
        template="qwen2_vl",
        torch_dtype="float32",
        device_map="cpu",
        dataset=["given below"],  # a name is insisted on; nothing is looked up by it
        split_dataset_ratio=0.0,
        output_dir=f"{task.out}/checkpoints",
        add_version=False,
        check_model=False,  # asks a server
        tuner_type="lora",
        lora_rank=task.r,
        lora_alpha=task.alpha,
        lora_dropout=0.0,
        target_regex=recipe.targets(task),
        num_train_epochs=task.epochs,
        per_device_train_batch_size=task.batch,
        gradient_accumulation_steps=task.accumulation,
        learning_rate=task.lr,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        weight_decay=0.0,
        adam_beta2=0.999,  # 0.95 by default here
        max_grad_norm=1.0,
        gradient_checkpointing=task.checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=["none"],
        dataloader_num_workers=0,  # one process by default here; every other contender prepares its rows in the loop
        seed=task.seed,
        data_seed=task.seed,
        use_cpu=True,
        disable_tqdm=True,
        group_by_length=task.grouped,
    )
    model, loaded = args.get_model_processor()
    template = args.get_template(loaded)
    template.set_mode("train")
    template.model = model
    collate = recipe.Collate(task, recipe.processor(task))

    def encode(row: dict[str, Any], **_: Any) -> dict[str, Any]:
        batch = collate([row])
        whole = {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}
        return whole | {key: batch[key][0].tolist() for key in ("input_ids", "labels", "mm_token_type_ids")}

    rows = Encoded(map(encode, recipe.rows(task))) if task.grouped else LazyLLMDataset(recipe.rows(task), encode, strict=True)
    set_seed(task.seed)
    model = SwiftSft.prepare_model(args, model, template=template, train_dataset=rows)
    trainer = Seq2SeqTrainer(model=model, args=args.training_args, template=template, train_dataset=rows)
    found = recipe.trained(trainer)
    trainer.save_model(f"{task.out}/adapter")
    recipe.write_result(task, **found)


if __name__ == "__main__":
    main()
