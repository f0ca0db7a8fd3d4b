"""What a rewrite is, and how its forward functions are put on modules and taken off again."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

CLOSE = 1e-5  # of the largest output: more of a difference than rounding makes in fp32

Forward = Callable[..., torch.Tensor]  # a function (module, x) -> y; `self` of a method


class Rewrite(Protocol):
    """A faster form of some modules that computes the same values.

    name: as docs/speed.md lists it. devices: types of devices where it is applied, empty for all. gain: the measured gain, and where
    it was measured.
    """

    name: str
    devices: tuple[str, ...]
    gain: str

    def candidates(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The modules it could replace, by their kind."""
        ...

    def agrees(self, module: torch.nn.Module) -> bool:
        """Whether it gives what the module's own forward gives, on made-up input."""
        ...

    def forward(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the module computes from now on; calls the module's own forward where the rewrite does not hold."""
        ...


@dataclass
class Replaced:
    """The forward functions that were put on module instances, in order, so that they can be taken off again.

    classes: rewrite name -> classes of the modules it was applied to.
    """

    classes: dict[str, set[type]] = field(default_factory=dict)
    _earlier: list[tuple[torch.nn.Module, object]] = field(default_factory=list)
    _undone_by: list[Callable[[], None]] = field(default_factory=list)

    def put(self, module: torch.nn.Module, forward: Forward) -> None:
        """Let one module instance compute by `forward(module, x)`."""
        self.set(module, types.MethodType(forward, module))

    def set(self, module: torch.nn.Module, forward: Callable[..., object]) -> None:
        """Let one module instance compute by `forward(x)`."""
        self._earlier.append((module, vars(module).get("forward")))
        module.forward = forward

    def changed(self, name: str, kind: type, undo: Callable[[], None]) -> None:
        """Note a rewrite that changed a model of class `kind` in another way, and what takes it off."""
        self.classes[name] = {kind}
        self._undone_by.append(undo)

    def remove(self) -> None:
        """Give every module back the forward it had."""
        for undo in self._undone_by:
            undo()
        self._undone_by.clear()
        for module, earlier in reversed(self._earlier):
            if earlier is None:
                del module.forward
            else:
                module.forward = earlier
        self._earlier.clear()
        self.classes.clear()


def own_forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module's class computes, whatever forward stands on the instance."""
    return type(module).forward(module, x)


def apply(rewrite: Rewrite, model: torch.nn.Module, replaced: Replaced) -> None:
    """Put a rewrite on every candidate whose class agrees with it; one instance of each class is compared."""
    by_class: dict[type, list[torch.nn.Module]] = {}
    for module in rewrite.candidates(model):
        if not rewrite.devices or _device(module) in rewrite.devices:
            by_class.setdefault(type(module), []).append(module)
    put(rewrite, (m for modules in by_class.values() if rewrite.agrees(modules[0]) for m in modules), replaced)


def put(rewrite: Rewrite, modules: Iterable[torch.nn.Module], replaced: Replaced) -> None:
    """Put a rewrite on these modules, without a comparison."""
    for module in modules:
        replaced.put(module, _method(rewrite))
        replaced.classes.setdefault(rewrite.name, set()).add(type(module))


def _method(rewrite: Rewrite) -> Forward:
    """A plain function: torch.compile cannot trace a functools.partial as a method."""

    def forward(module: torch.nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args or kwargs:
            return type(module).forward(module, x, *args, **kwargs)
        return rewrite.forward(module, x)

    return forward


def _device(module: torch.nn.Module) -> str:
    return next(module.parameters()).device.type
