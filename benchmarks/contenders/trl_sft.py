"""TRL's SFTTrainer on the same work: its own loop and loss, fed with the tutorial's collation so that ids and labels are equal.

    PEER_PYTHON trl_sft.py task.json
"""

from __future__ import annotations

import recipe


def main() -> None:
    task = recipe.task()
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, set_seed
    from trl import SFTConfig, SFTTrainer

    processor = recipe.processor(task)
    model = AutoModelForImageTextToText.from_pretrained(task.model, dtype="float32")
    collate = recipe.Collate(task, processor)
    set_seed(task.seed)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{task.out}/checkpoints",
            num_train_epochs=task.epochs,
            per_device_train_batch_size=task.batch,
            gradient_accumulation_steps=task.accumulation,
            learning_rate=task.lr,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=task.checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            seed=task.seed,
            data_seed=task.seed,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(recipe.rows(task)),
        data_collator=collate,
        processing_class=processor,
        peft_config=recipe.lora_config(task),
    )
    found = recipe.trained(trainer)
    trainer.save_model(f"{task.out}/adapter")
    recipe.write_result(task, **found)


if __name__ == "__main__":
    main()
