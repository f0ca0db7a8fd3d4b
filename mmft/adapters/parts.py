"""The keys of `lora` about a whole part of the model: a rank of its own, full training beside an adapter, the top layers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, nearest
from ..common.model_parts import PARTS, parameter_counts, part_of
from ..config.settings import Section

if TYPE_CHECKING:
    import torch

WHOLE = ("vision", "connector", "qformer")  # parts that can be trained whole beside an adapter; the language model by lora=none alone
LAYER = re.compile(r"^(?:.*?\.)?[^.]*\.(\d+)\.")  # the first number that is followed by more


def check_part(key: str, part: str, skeleton: torch.nn.Module, known: Sequence[str] = PARTS) -> None:
    """Raises UserError for a part that does not exist, or that this model has not. key: in the message."""
    if part not in known:
        raise UserError(f"{key}.{part}: no such part.{nearest(str(part), known)} There are: {', '.join(known)}.")
    counts = parameter_counts(skeleton)
    if not counts.get(part):
        raise UserError(f"{key}.{part}: this model has no parameters in a part {part}; it has {', '.join(f'{name} ({n:,})' for name, n in counts.items())}")


def part_patterns(
    parts: Mapping[str, Any], names: Mapping[str, str], allowed: Iterable[str], scope: str, skeleton: torch.nn.Module,
) -> tuple[set[str], dict[str, int], dict[str, float]]:  # fmt: skip
    """(modules left out by r=0, rank_pattern, alpha_pattern) of `lora.parts`.

    names: adapted module -> its part. allowed: the parts inside `scope`. Raises UserError.
    """
    left_out: set[str] = set()
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for part, own in (parts or {}).items():
        check_part("lora.parts", part, skeleton)
        if not isinstance(own, Mapping) or set(own) - {"r", "lora_alpha"}:
            wrong = next(iter(set(own) - {"r", "lora_alpha"})) if isinstance(own, Mapping) else own
            raise UserError(f"lora.parts.{part}: {wrong} is no key of a part; it has r and lora_alpha, e.g. lora.parts.{part}.r=4")
        if part not in allowed:
            raise UserError(f"lora.parts.{part}: lies outside lora.scope={scope}; use lora.scope=all, with r=0 for the parts to leave out")
        inside = [name for name, its in names.items() if its == part]
        if not inside:
            raise UserError(f"lora.parts.{part}: lora.target_modules names no layer of this part")
        rank, alpha = own.get("r"), own.get("lora_alpha")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
            raise UserError(f"lora.parts.{part}.r={rank}: must be a whole number, or 0 to leave the part out")
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0):
            raise UserError(f"lora.parts.{part}.lora_alpha={alpha}: must be a number above 0")
        if rank == 0:
            left_out |= set(inside)
            continue
        pattern = target_pattern(inside)
        ranks |= {pattern: rank} if rank is not None else {}
        alphas |= {pattern: alpha} if alpha is not None else {}
    return left_out, ranks, alphas


def whole_modules(skeleton: torch.nn.Module, parts: Sequence[str]) -> dict[str, str]:
    """module -> part: the topmost modules that hold all parameters of `lora.whole`, by full names. Raises UserError."""
    import torch

    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise UserError(f"lora.whole={parts}: must be a list of parts, e.g. lora.whole=[connector]")
    found: dict[str, str] = {}
    for part in parts:
        if part == "language":
            raise UserError("lora.whole=[language]: the language model whole is lora=none lora.scope=language; beside an adapter stand vision, connector, qformer")
        check_part("lora.whole", part, skeleton, WHOLE)
        loose: list[str] = []

        def visit(name: str, module: torch.nn.Module, part: str = part, loose: list[str] = loose) -> None:
            parameters = [f"{name}.{n}" if name else n for n, _ in module.named_parameters()]
            if not any(part_of(n) == part for n in parameters):
                return
            container = isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)) or not name
            if not container and all(part_of(n) == part for n in parameters):
                found[name] = part
                return
            loose += [n for n in (f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)) if part_of(n) == part]
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)

        visit("", skeleton)
        if loose:
            raise UserError(f"lora.whole=[{part}]: {loose[0]} is a parameter beside modules, which peft cannot save with an adapter; lora.modules_to_save names the modules to train")
    return found


def top_layer_parameters(skeleton: torch.nn.Module, scope: str, parts: set[str], count: Any) -> set[str]:
    """The parameters in the last `count` numbered layers of the part `scope`. Raises UserError."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"lora.top_layers={count}: must be a whole number of layers above 0")
    if len(parts) != 1:
        raise UserError(f"lora.top_layers={count}: the top layers are those of one part; add lora.scope=language (or vision)")
    layer = {name: int(m[1]) for name, _ in skeleton.named_parameters() if part_of(name) in parts and (m := LAYER.match(name))}
    if not layer:
        raise UserError(f"lora.top_layers={count}: the {scope} part has no numbered layers")
    last = max(layer.values())
    if count > last + 1:
        raise UserError(f"lora.top_layers={count}: the {scope} part has {last + 1} layers")
    return {name for name, number in layer.items() if number > last - count}


def rank_and_alpha(settings: Section, name: str) -> tuple[int, float]:
    """(rank, alpha) of an adapted module, by peft's own rule for rank_pattern and alpha_pattern."""

    def chosen(patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
        return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise)

    return chosen(settings.get("rank_pattern"), settings.get("r")), chosen(settings.get("alpha_pattern"), settings.get("lora_alpha") or 8)


def target_pattern(names: Iterable[str]) -> str:
    """One regular expression that matches these module names, with `\\d+` in place of layer numbers."""
    names = set(names)
    loose = {re.sub(r"\.\d+(?=\.)", r".<n>", n) for n in names}
    pattern = "|".join(sorted(re.escape(n).replace("<n>", r"\d+") for n in loose))
    return pattern
