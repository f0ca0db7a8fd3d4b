"""LLaMA-Factory's CustomSeq2SeqTrainer on the same work, with its own argument parsing, model preparation and adapter.

    PEER_PYTHON llamafactory_sft.py task.json

It is fed with the tutorial's collation: its templates put loss on the newline behind the end token, too, and no setting takes it off.

`grouped` in the task: rows of similar length share the batches of a step (transformers' own sampler, by the token ids that LLaMA-Factory's data sets hold
as well). `packed`: the rows of a batch lie end to end, as with its neat_packing, under its own mask for attention without FlashAttention; its packs
would be padded to cutoff_len, these are not.
"""

from __future__ import annotations

import os
from typing import Any

import recipe


class Packed:
    """Batches of one sequence with LLaMA-Factory's mask, in which a token sees the earlier ones of its own row."""

    def __init__(self, collate: recipe.Collate, rope: Any):
        self.collate, self.rope = collate, rope

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch
        from llamafactory.data.collator import prepare_4d_attention_mask

        batch = self.collate(rows)
        mask = batch["attention_mask"]
        kept = mask.flatten().nonzero().squeeze(1)
        inputs = {key: batch.get(key) for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        spatial = self.rope(**inputs)[0] if batch.get("image_grid_thw") is not None else (mask.cumsum(1) - 1).expand(3, *mask.shape)
        text = torch.arange(mask.shape[1]).expand_as(mask)[None]
        batch["labels"][:, 0] = recipe.IGNORE
        packed = {key: batch[key].flatten()[kept][None] for key in ("input_ids", "labels", "mm_token_type_ids") if key in batch}
        packed["position_ids"] = torch.cat([text, spatial]).flatten(1)[:, kept][:, None]
        numbers = mask * torch.arange(1, len(rows) + 1)[:, None]
        packed["attention_mask"] = prepare_4d_attention_mask(numbers.flatten()[kept][None], torch.float32)
        return {**batch, **packed}


def main() -> None:
    task = recipe.task()
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from transformers import set_seed

    words = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": task.model,
        "dataset": "given below",  # a name is insisted on; nothing is looked up by it
        "output_dir": f"{task.out}/checkpoints",
        "finetuning_type": "lora",
        "lora_rank": task.r,
        "lora_alpha": task.alpha,
        "lora_dropout": 0.0,
        "lora_target": ",".join(task.targets),  # it keeps them out of the frozen tower itself
        "disable_gradient_checkpointing": not task.checkpointing,  # on by default here, and another switch than the Trainer's
        "num_train_epochs": task.epochs,
        "per_device_train_batch_size": task.batch,
        "gradient_accumulation_steps": task.accumulation,
        "learning_rate": task.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": task.seed,
        "data_seed": task.seed,
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length" if task.grouped else "random",
    }
    model_args, _, training_args, finetuning_args, _ = get_train_args(words)
    model_args.device_map = {"": "cpu"}  # it would take a GPU where there is one, whatever use_cpu says
    processor = recipe.processor(task)
    set_seed(task.seed)  # loading draws no numbers, so the adapter that load_model adds begins as the plain loop's
    model = load_model(processor.tokenizer, model_args, finetuning_args, is_trainable=True)
    collate: Any = recipe.Collate(task, processor)
    rows = recipe.rows(task)
    if task.grouped:
        rows = [row | {"input_ids": collate([row])["input_ids"][0].tolist()} for row in rows]
    if task.packed:
        collate = Packed(collate, model.get_base_model().model.get_rope_index)
    trainer = CustomSeq2SeqTrainer(
        model=model,
        args=training_args,
        finetuning_args=finetuning_args,
        tokenizer=processor.tokenizer,
        # With a processor it takes the mean of each micro-batch, not of the step's tokens, which would be another loss.
        processor=None,
        train_dataset=rows,
        data_collator=collate,
    )
    found = recipe.trained(trainer)
    trainer.save_model(f"{task.out}/adapter")
    processor.save_pretrained(f"{task.out}/adapter")
    recipe.write_result(task, **found)


if __name__ == "__main__":
    main()
