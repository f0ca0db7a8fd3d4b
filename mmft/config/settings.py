"""Types of the resolved configuration."""

from __future__ import annotations

from typing import Any, TypedDict

# A section of the config: keys and plain yaml values (None, bool, number, text, lists and mappings of these).
Section = dict[str, Any]


def sharded_by(trainer: Section) -> str | None:
    """The key of the section `trainer` that spreads the model's weights over processes, `fsdp` or `deepspeed`; None if none is set."""
    return next((key for key in ("fsdp", "deepspeed") if trainer.get(key)), None)


class KeptSection(TypedDict):
    """A set in evaluation.keep. data: as the section `data`, or {prepared: FOLDER}. metrics: as the section `metrics`."""

    data: Section
    metrics: Section
    max_new_tokens: int | str | None


class EvaluationSettings(TypedDict):
    """The section `evaluation`."""

    split: str | None
    max_samples: int | None
    batch_size: int
    base: bool
    samples: int
    sample_steps: int | None
    generate: bool
    keep: dict[str, KeptSection] | None
    keep_metrics: None  # compose has put them into the sections of `keep`
    answer: str
    choice_norm: str


class Settings(TypedDict):
    """A resolved config as plain values: conf/config.yaml and one section for each group."""

    seed: int
    name: str | None
    output_dir: str
    run_dir: str | None
    rank_by: str
    vision_cache: str
    vision_cache_gb: float
    augment: Section | None
    evaluation: EvaluationSettings
    generation: Section
    task: Section
    model: Section
    collator: Section
    data: Section
    lora: Section
    trainer: Section
    logger: Section
    metrics: Section
    objective: Section
