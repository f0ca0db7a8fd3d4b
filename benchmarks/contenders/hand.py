"""A loop written by hand over the same caches: features and token ids computed once, logits where there is loss, no Trainer.

    python hand.py task.json

What a careful person would write who knows everything mmft does. `merged` in the task: the micro-batches of a step are one batch.
"""

from __future__ import annotations

import time

import recipe


def main() -> None:
    task = recipe.task()
    import torch
    import torch.nn.functional as F
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText, set_seed

    processor = recipe.processor(task)
    model = AutoModelForImageTextToText.from_pretrained(task.model, dtype="float32").eval()
    collate = recipe.Collate(task, processor)
    rows = recipe.rows(task)

    started = time.perf_counter()
    kept = []  # of each row: its tensors without padding, the features of its images, and their grids
    with torch.no_grad():
        for at in range(0, len(rows), 8):
            batch = collate(rows[at : at + 8])
            given = {k: batch[k] for k in ("pixel_values", "image_grid_thw") if k in batch}
            features: list = []
            if given:
                output = model.get_image_features(**given, return_dict=True)
                kind, features = type(output), list(output.pooler_output)
            first = 0
            for n, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                entry = {k: batch[k][n, :length] for k in ("input_ids", "labels", "mm_token_type_ids") if k in batch}
                own = slice(first, first + len(recipe.pictures(rows[at + n])))
                first = own.stop
                kept.append((entry, features[own], list(batch["image_grid_thw"][own]) if "image_grid_thw" in batch else []))
    cache = time.perf_counter() - started

    def batched(chosen: list[int]) -> tuple[dict, torch.Tensor]:
        entries, features, grids = zip(*(kept[i] for i in chosen))
        pad = {"input_ids": processor.tokenizer.pad_token_id, "labels": recipe.IGNORE, "mm_token_type_ids": 0}
        batch = {k: torch.nn.utils.rnn.pad_sequence([e[k] for e in entries], True, pad[k]) for k in entries[0]}
        batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence([torch.ones_like(e["input_ids"]) for e in entries], True, 0)
        stacked = task.family == "blip2"
        features, grids = ([one for own in each for one in own] for each in (features, grids))
        if features:
            batch["mm_encoder_outputs"] = {"image": kind(pooler_output=torch.stack(features) if stacked else tuple(features))}
        if grids:
            batch["image_grid_thw"] = torch.stack(grids)
        if task.family == "blip2":
            batch["pixel_values"] = None  # an argument that its forward insists on
        return batch, batch.pop("labels")

    set_seed(task.seed)
    model = get_peft_model(model, recipe.lora_config(task))
    if task.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, weight_decay=0.0)
    size = task.batch * task.accumulation
    steps = -(-len(rows) // size) * task.epochs
    width = size if task.merged else task.batch
    losses = []
    started = time.perf_counter()
    for epoch in range(task.epochs):
        shuffled = recipe.order(task, epoch, len(rows))
        for at in range(0, len(rows), size):
            whole = shuffled[at : at + size]
            count = sum(int((kept[i][0]["labels"] != recipe.IGNORE).sum()) for i in whole)
            for group in optimizer.param_groups:
                group["lr"] = task.lr * (1 - len(losses) / steps)
            total = torch.zeros(())
            for first in range(0, len(whole), width):
                batch, labels = batched(whole[first : first + width])
                keep = torch.zeros_like(labels, dtype=torch.bool)
                keep[:, :-1] = labels[:, 1:] != recipe.IGNORE
                logits = model(**batch, logits_to_keep=keep, use_cache=False).logits
                loss = F.cross_entropy(logits, labels[:, 1:][keep[:, :-1]], reduction="sum") / count
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item())
    loop = time.perf_counter() - started
    model.save_pretrained(f"{task.out}/adapter")
    recipe.write_result(task, loop=loop, cache=cache, losses=losses)


if __name__ == "__main__":
    main()
