"""The plain loop, as the usual tutorial writes it: processor in the collator, peft, stock transformers.Trainer.

    python plain.py task.json
"""

from __future__ import annotations

import recipe


def main() -> None:
    task = recipe.task()
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, set_seed

    processor = recipe.processor(task)
    model = AutoModelForImageTextToText.from_pretrained(task.model, dtype="float32")
    if task.checkpointing:
        model.enable_input_require_grads()  # the line that tutorials write; gradient_checkpointing_enable does the same without it
    set_seed(task.seed)
    model = get_peft_model(model, recipe.lora_config(task))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{task.out}/checkpoints",
            num_train_epochs=task.epochs if task.drawn is None else 1,
            train_sampling_strategy="random" if task.drawn is None else "sequential",
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
            seed=task.seed,
            data_seed=task.seed,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=recipe.rows(task),
        data_collator=recipe.Collate(task, processor),
    )
    found = recipe.trained(trainer)
    model.save_pretrained(f"{task.out}/adapter")
    processor.save_pretrained(f"{task.out}/adapter")
    recipe.write_result(task, **found)


if __name__ == "__main__":
    main()
