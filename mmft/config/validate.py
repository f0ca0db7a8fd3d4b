"""Check every key and value of a composed config without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from ..common.errors import UserError, nearest
from . import keep, key_table, library_keys, ranges
from .build import build
from .choices import ANSWERS, AUGMENT_TRANSFORMS, CHOICE_NORMS, PREFERENCE_SCORES, TRAINER_METRICS
from .groups import CONFIG_DIR, GROUPS, content
from .guard import remote_code, secrets
from .guard.targets import parameters, resolve
from .key_lookup import TOP_LEVEL_TYPES
from .key_types import check_keys, check_value
from .plain import to_plain
from .ranking import is_supervised


def check(cfg: DictConfig) -> None:
    """Check every key and every simple value of a composed config. Raises UserError."""
    plain = to_plain(cfg)
    remote_code.check(plain)
    secrets.check({k: v for k, v in plain.items() if k != "task"})
    # with run=..., words such as data.path=... change the run's own config and are checked there
    overlays_run = (plain.get("task") or {}).get("run") is not None
    if not overlays_run:
        check_sources(plain.get("data") or {})
    check_targets({"task": plain["task"]} if overlays_run else plain)
    defaults = content(CONFIG_DIR / "config.yaml")
    check_keys("", plain, {k: "" for k in (*defaults, *GROUPS)})
    check_keys("evaluation", plain["evaluation"], {k: "" for k in defaults["evaluation"]})
    keep.check(plain["evaluation"].get("keep"))
    check_choosing(plain["evaluation"])
    if not overlays_run:
        build(plain.get("objective"), "objective")
    check_augment(plain.get("augment"))
    check_generation(plain["generation"])
    directions = score_directions(plain) if not overlays_run else {}
    check_best_metric(plain, directions)
    for key, kind in TOP_LEVEL_TYPES.items():
        check_value(key, plain.get(key), kind)
    scores = ("eval_loss", *directions)
    if not overlays_run and plain.get("rank_by") not in scores:
        hint = nearest(str(plain.get("rank_by")), scores)
        raise UserError(f"rank_by={plain.get('rank_by')}: no such metric.{hint} There are: {', '.join(scores)} (metrics=[...] adds others).")
    for section, known in library_keys.sections().items():
        node: Any = plain
        for part in section.split("."):
            node = (node or {}).get(part)
        if node and known:
            check_keys(section, node, known)
            key_table.check(section, {k: v for k, v in node.items() if k not in library_keys.OWN_KEYS}, known)
    ranges.check(plain)


def check_sources(data: Mapping[str, Any]) -> None:
    """Refuse sources beside a data set that is no mix. Raises UserError."""
    if data.get("sources") and data.get("_target_") and "sources" not in parameters(resolve(data["_target_"], "data")):
        raise UserError(f"data.sources.{next(iter(data['sources']))}: sources belong to a mix; add data=mix to the command")


# Keys that act on sampled answers only, or with several beams only, and the values that change nothing. transformers takes them in silence and then
# refuses to save such settings with the trained adapter.
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
BEAMS = {"early_stopping": False, "length_penalty": 1.0}


def check_generation(generation: dict[str, Any]) -> None:
    """Check the limit of new tokens, and that no key lacks the one that it depends on. Raises UserError."""
    limit = generation.get("max_new_tokens")
    if limit is not None and limit != "auto" and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"generation.max_new_tokens={limit}: must be a whole number of tokens above 0, or auto (from the lengths of the references)")
    if limit is None and generation.get("max_length") is None:
        raise UserError("generation.max_new_tokens=null: answers need a limit; use a number, auto (from the lengths of the references), or generation.max_length=N")
    for keys, on, where, needs in (
        (SAMPLING, bool(generation.get("do_sample")), "sampled answers", "generation.do_sample=true"),
        (BEAMS, (generation.get("num_beams") or 1) > 1, "several beams", "generation.num_beams=4"),
    ):
        for key, neutral in keys.items():
            value = generation.get(key)
            if not on and value is not None and value != neutral:
                raise UserError(f"generation.{key}={value}: acts on {where} only; add {needs}, or drop it")


def check_choosing(evaluation: Mapping[str, Any]) -> None:
    """Check how answers are made. Raises UserError."""
    for name, known in (("answer", ANSWERS), ("choice_norm", CHOICE_NORMS)):
        value = evaluation.get(name, known[0])
        if value not in known:
            raise UserError(f"evaluation.{name}={value}: must be {', '.join(known[:-1])} or {known[-1]}.{nearest(str(value), known)}")


def metric_directions(section: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """name -> whether higher is better, of every score of the config's metrics; of a mix also of each source, and its loss (`loss/chat`).

    section, data: of the config. Raises UserError for a metric that cannot be built.
    """
    scores = [score for key, node in section.items() if node is not None for score in build(node, f"metrics.{key}").scores]
    directions = {score.name: score.higher_is_better for score in scores}
    return directions | {f"{name}/{source}": higher for source in (data or {}).get("sources") or () for name, higher in {"loss": False, **directions}.items()}


def score_directions(plain: Mapping[str, Any]) -> dict[str, bool]:
    """name -> whether higher is better, of every score of a plain config: of its metrics, and of the sets in evaluation.keep."""
    directions = metric_directions(plain.get("metrics") or {}, plain.get("data") or {})
    if not is_supervised(plain.get("objective")) and build(plain["objective"], "objective").PREFERENCE:
        directions |= PREFERENCE_SCORES
    for name, section in (plain["evaluation"].get("keep") or {}).items():
        scores = {**metric_directions(section["metrics"]), "loss": False}
        directions |= {keep.score_name(name, score): higher for score, higher in scores.items()}
    return directions


def check_best_metric(plain: dict[str, Any], directions: Mapping[str, bool]) -> None:
    """Check that training measures the metric that decides between checkpoints. Raises UserError."""
    trainer, evaluation = plain.get("trainer") or {}, plain["evaluation"]
    given = trainer.get("metric_for_best_model")
    if given is None or trainer.get("eval_strategy") in (None, "no", False) or evaluation.get("split") is None:
        return
    name = str(given).removeprefix("eval_")
    if name in directions and keep.split_name(name):
        raise UserError(f"trainer.metric_for_best_model={given}: sets of evaluation.keep are measured before and after training, not during it")
    if name in directions and name.partition("/")[0] not in ("loss", *PREFERENCE_SCORES) and not evaluation.get("generate"):
        raise UserError(f"trainer.metric_for_best_model={given}: {name} is measured while training only with evaluation.generate=true; add that,"
                        " or use trainer.metric_for_best_model=loss")  # fmt: skip
    if name not in directions and name not in ("loss", *TRAINER_METRICS):
        names = ("loss", *directions)
        raise UserError(f"trainer.metric_for_best_model={given}: no such metric.{nearest(name, names)} There are: {', '.join(names)} (metrics=[...] adds others).")


def check_targets(node: Any, where: str = "") -> None:
    """Check every `_target_` below a node, and the keys beside it. where: the node's full key. Raises UserError."""
    if isinstance(node, dict):
        if "_target_" in node:
            known = parameters(resolve(node["_target_"], where))
            check_keys(where, {k: v for k, v in node.items() if k != "_target_"}, known)
        for key, value in node.items():
            check_targets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check_targets(value, f"{where}[{i}]")


def check_augment(node: Any) -> None:
    """Check names and keys of the section `augment`. Raises UserError."""
    if node is None:
        return
    if not isinstance(node, dict):
        raise UserError(f"augment={node}: must be transforms with their keys, e.g. augment.ColorJitter.brightness=0.2; there are: {', '.join(AUGMENT_TRANSFORMS)}")
    for name, keys in node.items():
        if name not in AUGMENT_TRANSFORMS:
            raise UserError(f"augment.{name}: no such transform.{nearest(str(name), AUGMENT_TRANSFORMS)} There are: {', '.join(AUGMENT_TRANSFORMS)}.")
        if keys is not None and not isinstance(keys, dict):
            raise UserError(f"augment.{name}={keys}: must be its keys ({', '.join(AUGMENT_TRANSFORMS[name])}), {{}} for torchvision's own values, or null for off")
        for key in keys or ():
            if key not in AUGMENT_TRANSFORMS[name]:
                raise UserError(f"augment.{name}.{key}: no such key.{nearest(str(key), AUGMENT_TRANSFORMS[name])} There are: {', '.join(AUGMENT_TRANSFORMS[name])}.")
