"""Numbers of a config that torch, transformers or numpy would refuse late, some after the base was measured, or silently read as something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..common.errors import UserError

Rule = tuple[Callable[[float], bool], str]

COUNT: Rule = (lambda n: n >= 1 and n == int(n), "a whole number above 0")
POSITIVE: Rule = (lambda n: n > 0, "above 0")
NOT_NEGATIVE: Rule = (lambda n: n >= 0, "0 or above")
SHARE: Rule = (lambda n: 0 <= n < 1, "0 or above and below 1")

RULES: dict[str, Rule] = {
    "seed": (lambda n: 0 <= n < 1 << 32, "a whole number from 0 to 4294967295"),
    "evaluation.batch_size": COUNT,
    "evaluation.max_samples": (COUNT[0], "a whole number above 0, or null for all rows"),
    "evaluation.sample_steps": (COUNT[0], "a whole number above 0, or null"),
    "evaluation.samples": NOT_NEGATIVE,
    # transformers reads 0 as "not given" and trains the epochs
    "trainer.max_steps": (lambda n: n == -1 or n >= 1, "above 0, or -1 for trainer.num_train_epochs; mmft evaluate measures a model without training"),
    "trainer.num_train_epochs": NOT_NEGATIVE,
    "trainer.per_device_train_batch_size": COUNT,
    "trainer.per_device_eval_batch_size": COUNT,
    "trainer.gradient_accumulation_steps": COUNT,
    "trainer.logging_steps": POSITIVE,
    "trainer.eval_steps": POSITIVE,
    "trainer.save_steps": POSITIVE,
    "trainer.learning_rate": NOT_NEGATIVE,
    "trainer.weight_decay": NOT_NEGATIVE,
    "trainer.adam_epsilon": NOT_NEGATIVE,
    "trainer.adam_beta1": SHARE,
    "trainer.adam_beta2": SHARE,
    "trainer.max_grad_norm": NOT_NEGATIVE,
    "trainer.warmup_steps": NOT_NEGATIVE,
    "trainer.eval_delay": NOT_NEGATIVE,
    "trainer.label_smoothing_factor": SHARE,
    "trainer.dataloader_num_workers": NOT_NEGATIVE,
    "lora.lora_dropout": (lambda n: 0 <= n <= 1, "from 0 to 1"),
    "lora.lora_alpha": (lambda n: n > 0, "above 0: it scales what the adapter adds"),
}


def check(plain: Mapping[str, Any]) -> None:
    """Refuse numbers outside their range; other values, such as null and texts, have checks of their own. plain: a config. Raises UserError that names the key."""
    for key, (fits, what) in RULES.items():
        *sections, name = key.split(".")
        node: Any = plain
        for section in sections:
            node = node.get(section) if isinstance(node, Mapping) else None
        value = node.get(name) if isinstance(node, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not (math.isfinite(value) and fits(value)):
            raise UserError(f"{key}={value}: must be {what}")
