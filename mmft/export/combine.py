"""Combine the adapters of several runs of one base into one adapter, by peft's rules or as a greedy soup."""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.stored import CONFIG, WEIGHTS, StoredAdapter, read_adapter
from ..common.errors import UserError, nearest
from ..common.records import ParentRecord
from ..runs.adapter import load_adapter
from ..runs.open import OpenedRun
from ..runs.parents import COMBINED, Parent, check_base

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger("mmft")

SOUP = "soup"
# how= -> peft's combination_type of add_weighted_adapter. B A is exact for cat and svd (up to the rank); linear, ties and dare work on A and B apart.
HOWS = {
    "linear": "linear", "svd": "svd", "cat": "cat", "ties": "ties", "dare": "dare_linear", "ties_svd": "ties_svd", "dare_svd": "dare_linear_svd", SOUP: "cat",
}  # fmt: skip
THINNED = ("ties", "dare", "ties_svd", "dare_svd")  # which keep a share of the weights (density)
RANKED = ("svd", "ties_svd", "dare_svd", SOUP)  # whose rank can be chosen
# What an adapter may not have beside A and B: peft combines these alone.
BESIDE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


@dataclass
class Ingredient:
    """An adapter that may be combined. name: of the adapter in the model. score: by the objective, of a soup."""

    parent: Parent
    stored: StoredAdapter
    weight: float = 1.0
    name: str = "default"
    score: float | None = None

    def record(self) -> ParentRecord:
        return {**self.parent.record(), "weight": self.weight}


@dataclass(frozen=True)
class Recipe:
    """how: of HOWS. density: share of the weights that ties and dare keep. rank: of the result; None: what `how` gives."""

    how: str
    density: float | None = None
    rank: int | None = None

    def check(self) -> None:
        """Raises UserError for values that do not go together."""
        if self.how not in HOWS:
            raise UserError(f"how={self.how}: no such way.{nearest(self.how, HOWS)} There are: {', '.join(HOWS)}.")
        if self.density is not None and self.how not in THINNED:
            raise UserError(f"density={self.density}: acts with how={', '.join(THINNED)}; drop it")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density={self.density}: must be a share of the weights above 0, at most 1")
        if self.rank is not None and (self.how not in RANKED or isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise UserError(f"rank={self.rank}: must be a whole number above 0, and acts with how={', '.join(RANKED)}")


def check_weights(weights: Sequence[Any] | None, count: int, how: str) -> list[float]:
    """The weights of `count` adapters, equal ones where none are given. Raises UserError."""
    if weights is None:
        return [1 / count] * count
    if how == SOUP:
        raise UserError("weights: a soup averages what it takes in with equal weights; drop them, or choose another how=")
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != count:
        raise UserError(f"weights={weights}: must be a list of {count} numbers, one for each run")
    if bad := [w for w in weights if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w)]:
        raise UserError(f"weights={list(weights)}: {bad[0]} is no number")
    if not any(weights):
        raise UserError(f"weights={list(weights)}: all are 0, so nothing would be left")
    return [float(w) for w in weights]


def check_ingredients(found: Sequence[Ingredient], opened: OpenedRun, recipe: Recipe) -> None:
    """Raises UserError that names an adapter which cannot be combined with the first, or at all."""
    first = found[0]
    for one in found:
        where = f"run={one.parent.path}"
        check_base(one.parent, opened.loaded.located, where)
        if [p["sha256"] for p in one.parent.below] != opened.loaded.below:
            raise UserError(f"{where}: does not sit on what {first.parent.path} sits on: other adapters are merged below it (model.adapters)")
        if beside := next((key for key in BESIDE if one.stored.config.get(key)), None):
            raise UserError(f"{where}: was trained with lora.{beside}, and only the matrices of an adapter can be combined")
        if one.stored.config.get("bias") not in (None, "none"):
            raise UserError(f"{where}: was trained with lora.bias={one.stored.config['bias']}, and only the matrices of an adapter can be combined")
        if recipe.how in ("linear", "ties", "dare") and one.stored.ranks != first.stored.ranks:
            name = min((n for n in {**one.stored.ranks, **first.stored.ranks} if one.stored.ranks.get(n) != first.stored.ranks.get(n)), default="")
            raise UserError(
                f"{where}: has the rank {one.stored.ranks.get(name, 'none')} at {name}, where {first.parent.path} has {first.stored.ranks.get(name, 'none')};"
                f" how={recipe.how} adds the matrices as they are, how=svd and how=cat take any ranks"
            )


def load_all(opened: OpenedRun, found: Sequence[Ingredient]) -> None:
    """Load every adapter beside the first, which the run was opened with. Raises UserError."""
    for number, one in enumerate(found[1:], 1):
        one.name = f"part{number}"
        load_adapter(opened.model, one.parent.folder, one.name)
    for one in found:
        config = opened.model.peft_config[one.name]
        config.target_modules = set(one.stored.ranks)  # peft combines no names with the expression that a checkpoint or an older run has
        config.use_rslora = False  # peft gives the combined adapter the scale 1 by lora_alpha = r, which holds for plain LoRA alone


def combine(model: PeftModel, found: Sequence[Ingredient], recipe: Recipe, name: str) -> None:
    """Add the adapter `name` to the model: the weighted combination of those given. Raises UserError."""
    used = [one for one in found if one.weight != 0]
    kind = HOWS[recipe.how] if recipe.how != SOUP or recipe.rank is None else "svd"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(
                [one.name for one in used], [one.weight for one in used], name, combination_type=kind, svd_rank=recipe.rank, svd_full_matrices=False,
                density=recipe.density if recipe.density is not None else 0.5 if recipe.how in THINNED else None,
            )  # fmt: skip
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"how={recipe.how}: peft cannot combine these adapters: {' '.join(str(error).split())[:300]}") from None
    model.set_adapter(name)
    model.eval()


def single(found: Sequence[Ingredient], recipe: Recipe) -> Ingredient | None:
    """The one adapter that a combination leaves as it is: all others have the weight 0, and nothing is thinned or cut."""
    used = [one for one in found if one.weight != 0]
    as_it_is = (recipe.how not in THINNED or recipe.density == 1) and (recipe.rank is None or recipe.rank >= max(used[0].stored.ranks.values()))
    return used[0] if len(used) == 1 and used[0].weight == 1 and as_it_is else None


@dataclass
class Soup:
    """A greedy soup: the adapters from the best one down, each kept if the average with it is not worse (Wortsman et al. 2022, arXiv 2203.05482).

    The average is that of what the adapters add to the base, sum of s B A / n, which averaged matrices would not give. measure: the score of
    the model as it is. taken: so far, with their weights. steps: what was tried.
    """

    model: Any
    measure: Callable[[], float]
    higher_is_better: bool
    taken: list[Ingredient] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def cook(self, found: Sequence[Ingredient]) -> list[Ingredient]:
        """The adapters that the soup keeps, with equal weights."""
        for one in found:
            self.model.set_adapter(one.name)
            one.score = self.measure()
            log.info("%-14s %s alone: %.4g", "soup", one.parent.path, one.score)
        sign = -1 if self.higher_is_better else 1
        ordered = sorted(found, key=lambda one: sign * float(one.score if one.score is not None else math.inf))
        self.taken, best = [replace(ordered[0], weight=1.0)], float(ordered[0].score or 0.0)
        for one in ordered[1:]:
            tried = [replace(each, weight=1 / (len(self.taken) + 1)) for each in (*self.taken, one)]
            combine(self.model, tried, Recipe(SOUP), "tried")
            score = self.measure()
            keeps = sign * score <= sign * best
            self.steps.append({"path": one.parent.path, "alone": one.score, "with_it": score, "before": best, "taken": keeps})
            log.info("%-14s with %s: %.4g, before %.4g: %s", "soup", one.parent.path, score, best, "taken" if keeps else "left out")
            self.model.set_adapter(self.taken[0].name)
            self.model.delete_adapter("tried")
            if keeps:
                self.taken, best = tried, score
        return self.taken


def save_combined(model: Any, name: str, first: Ingredient, folder: Path, base_config: dict[str, Any]) -> None:
    """Write the adapter `name` as an adapter's folder. base_config: names of the base, for its config."""
    staging = folder.with_name(f".{folder.name}")
    config = model.peft_config[name]
    config.base_model_name_or_path, config.revision = base_config.get("base_model_name_or_path"), base_config.get("revision")
    config.inference_mode = True
    model.save_pretrained(staging, selected_adapters=[name], save_embedding_layers=False)
    shutil.move(staging / name, folder)
    shutil.rmtree(staging, ignore_errors=True)


def copy_single(one: Ingredient, folder: Path) -> None:
    """Write an adapter's folder with the same bytes."""
    folder.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy2(one.parent.folder / name, folder / name)


def ingredients(parents: Sequence[Parent], weights: Sequence[float]) -> list[Ingredient]:
    """Raises UserError for an adapter that cannot be read."""
    return [Ingredient(replace(parent, role=COMBINED), read_adapter(parent.folder), weight) for parent, weight in zip(parents, weights, strict=True)]
