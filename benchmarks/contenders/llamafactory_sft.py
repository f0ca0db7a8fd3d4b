"""LLaMA-Factory's CustomSeq2SeqTrainer on the same work, with its own argument parsing, model preparation and adapter.

    PEER_PYTHON llamafactory_sft.py task.json

It is fed with the tutorial's collation: its templates put loss on the newline behind the end token, too, and no setting takes it off.
"""

from __future__ import annotations

import os

import recipe


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
    }
    model_args, _, training_args, finetuning_args, _ = get_train_args(words)
    model_args.device_map = {"": "cpu"}  # it would take a GPU where there is one, whatever use_cpu says
    processor = recipe.processor(task)
    set_seed(task.seed)  # loading draws no numbers, so the adapter that load_model adds begins as the plain loop's
    model = load_model(processor.tokenizer, model_args, finetuning_args, is_trainable=True)
    trainer = CustomSeq2SeqTrainer(
        model=model,
        args=training_args,
        finetuning_args=finetuning_args,
        tokenizer=processor.tokenizer,
        # With a processor it takes the mean of each micro-batch, not of the step's tokens, which would be another loss.
        processor=None,
        train_dataset=recipe.rows(task),
        data_collator=recipe.Collate(task, processor),
    )
    found = recipe.trained(trainer)
    trainer.save_model(f"{task.out}/adapter")
    processor.save_pretrained(f"{task.out}/adapter")
    recipe.write_result(task, **found)


if __name__ == "__main__":
    main()
