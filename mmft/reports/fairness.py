"""Whether the runs of a leaderboard may be compared: the same held-out rows, order of data, generation settings; the scale."""

from __future__ import annotations

from collections import Counter
from typing import Any

# what a difference in these settings means for the comparison
ORDER = ("seed", "trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps", "trainer.train_sampling_strategy")
AMOUNT = ("trainer.max_steps", "trainer.num_train_epochs")
HELD_OUT = ("evaluation.split", "evaluation.max_samples")


def check(board: dict[str, Any]) -> None:
    """Fill each row's "flags" with what sets it apart from most rows, and the board's notes. Seeds repeated for each setting are no flag."""
    rows = [r for r in board["rows"] if r["status"] == "finished"]
    for row, usual in ((r, _usual(rows, "data_fingerprint")) for r in rows):
        if row["summary"].get("data_fingerprint") != usual:
            row["flags"].append("other data")
    for row, usual in ((r, _usual(rows, "held_out_samples")) for r in rows):
        if row["summary"].get("held_out_samples") != usual:
            row["flags"].append(f"measured on {row['summary'].get('held_out_samples')} rows, most on {usual}")
    swept_seed = bool(board["groups"])
    for key in board["differing"]:
        kind = _kind(key)
        if kind is None or key == "seed" and swept_seed:
            continue
        usual = Counter(r["settings"].get(key, "") for r in rows).most_common(1)
        for row in rows:
            own = row["settings"].get(key, "")
            if own != usual[0][0]:
                row["flags"].append(f"{kind}: {key}={own or 'null'}")
    flagged = sum(bool(r["flags"]) for r in rows)
    if flagged:
        board["notes"].append(f"{flagged} of {len(rows)} runs are not on equal terms with the others; what sets them apart is written beside them.")
    if swept_seed:
        board["notes"].append("The seed also decides the order of the data; every other condition is the same unless a run is flagged.")
    together = sum((r["summary"].get("trained_together") or 1) > 1 for r in rows)
    if together:
        board["notes"].append(
            f"{together} of {len(rows)} runs were trained in step with others: their time, speed and memory are those of the group, and say"
            " nothing about one setting against another (`hydra/launcher=basic` trains one after the other)."
        )
    _scale(board, rows)


def _kind(key: str) -> str | None:
    if key in HELD_OUT:
        return "other held-out rows"
    if key in ORDER:
        return "other order of data"
    if key in AMOUNT:
        return "other amount of training"
    if key == "collator._target_":
        return "its loss counts other labels"
    if key.startswith("collator.") and key != "collator.max_length":  # that refuses rows and changes none
        return "other prompts"
    return "other generation" if key.startswith("generation.") else None


def _usual(rows: list[dict[str, Any]], key: str) -> Any:
    return Counter(r["summary"].get(key) for r in rows).most_common(1)[0][0]


def _scale(board: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A rank sweep that leaves alpha alone sweeps the scale of the adapter too."""
    scales = sorted({r["scale"] for r in rows if r["scale"] is not None})
    if "lora.r" in board["keys"] and len(scales) > 1 and not {"lora.lora_alpha", "lora.use_rslora"} & set(board["keys"]):
        stable = all(r["settings"].get("lora.use_rslora") == "True" for r in rows)
        formula = "alpha / sqrt(r)" if stable else "alpha / r"
        cure = "by the rank-stabilised rule" if stable else "so ranks are not compared alone; `experiment=rank_sweep` keeps the scale fixed"
        board["notes"].append(f"The rank also changes the effective scale {formula}, here from {scales[-1]:g} to {scales[0]:g}: {cure}.")
