"""Which package may import which, no import cycles, few packages: read from the source, imports inside functions included."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

from places import ROOT

# A package imports only itself and packages before it.
ORDER = (
    "common", "system", "config", "data", "collators", "losses", "adapters", "rewrites", "models", "evaluation", "feature_cache", "reports", "loggers",
    "runs", "export", "training", "audit", "conformance", "pipeline", "sweeps", "joint", "serving", "verbs", "api", "cli",
)  # fmt: skip
DATA_ONLY = {"assets"}  # holds files, no code
FLAT = {"__init__", "__main__", "api"}  # modules that lie in mmft/ itself; they may import anything
MOST_PACKAGES = 24


@dataclass(frozen=True)
class Import:
    """One imported module of mmft. typing_only: under TYPE_CHECKING, so it is not executed."""

    importer: str
    line: int
    target: str
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> parsed source."""
    found = {}
    for path in sorted((ROOT / "mmft").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports() -> tuple[Import, ...]:
    """All imports of mmft's modules by mmft's modules."""
    found = []
    for importer, tree in modules().items():
        is_package = (ROOT / importer.replace(".", "/")).is_dir()
        typing_only = {id(node) for branch in ast.walk(tree) if _is_type_checking(branch) for inner in branch.body for node in ast.walk(inner)}
        for node in ast.walk(tree):
            for target in _targets(node, importer, is_package):
                found.append(Import(importer, node.lineno, target, id(node) in typing_only))
    return tuple(dict.fromkeys(found))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def _targets(node: ast.AST, importer: str, is_package: bool) -> list[str]:
    """The modules of mmft that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in modules()]
    if not isinstance(node, ast.ImportFrom):
        return []
    parts = importer.split(".")
    base = parts[: len(parts) - node.level + is_package] if node.level else []
    source = ".".join([*base, *([node.module] if node.module else [])])
    # `from package import name` imports the module package.name if there is one, else the package itself
    candidates = [[f"{source}.{alias.name}", source] for alias in node.names]
    return [next(name for name in names if name in modules()) for names in candidates if any(name in modules() for name in names)]


def package(module: str) -> str:
    """The package, or the flat module, that a module belongs to; "" for mmft itself."""
    return module.split(".")[1] if "." in module else ""


def cycles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    following: dict[str, set[str]] = {}
    for source, target in edges:
        if source != target:
            following.setdefault(source, set()).add(target)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for node in following.get(waiting.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
        return seen

    reached = {node: reachable(node) for node in following}
    groups = {tuple(sorted(other for other in reached[node] if node in reached.get(other, ()))) for node in reached if node in reached[node]}
    return [list(group) for group in sorted(groups)]


def listed(violations: list[str]) -> str:
    return f"{len(violations)} violations:\n" + "\n".join(violations)


def test_imports_point_to_earlier_packages():
    violations = []
    for found in imports():
        source, target = package(found.importer), package(found.target)
        if source in ("", *FLAT) or target in ("", source):
            continue
        if target not in ORDER or source not in ORDER or ORDER.index(target) > ORDER.index(source):
            violations.append(f"{found}{' (TYPE_CHECKING)' if found.typing_only else ''}: {target} comes after {source}")
    assert not violations, listed(violations)


def test_no_import_cycles_between_modules():
    edges = {(i.importer, i.target) for i in imports() if not i.typing_only}
    # an import of a module runs the packages that contain it first
    edges |= {(source, target.rpartition(".")[0]) for source, target in edges if target.count(".") == 2 and package(source) != package(target)}
    violations = [" <-> ".join(group) for group in cycles(edges)]
    assert not violations, listed(violations)


def test_no_import_cycles_between_packages():
    edges = {(package(i.importer), package(i.target)) for i in imports() if not i.typing_only and package(i.importer) and package(i.target)}
    violations = [" <-> ".join(group) for group in cycles(edges)]
    assert not violations, listed(violations)


def test_every_package_is_in_the_order_and_there_are_few():
    packages = {package(name) for name in modules() if package(name) and (ROOT / "mmft" / package(name)).is_dir()}
    code = packages - DATA_ONLY
    print(f"{len(code)} packages with code, {len(modules())} modules, {len(imports())} imports")
    assert code <= set(ORDER), listed(sorted(f"mmft/{name} has no place in ORDER" for name in code - set(ORDER)))
    assert len(code) <= MOST_PACKAGES
    flat = {path.stem for path in (ROOT / "mmft").glob("*.py")}
    assert flat <= FLAT, listed(sorted(f"mmft/{name}.py lies outside of a package" for name in flat - FLAT))
    assert not [i for i in imports() if package(i.importer) in DATA_ONLY]


def test_the_checks_find_what_they_look_for():
    """An upward import, a cycle, and an import inside a function are seen."""
    assert cycles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == [["a", "b", "c"]]
    assert cycles({("a", "b"), ("b", "c")}) == []
    inside_functions = [i for i in imports() if not i.typing_only and i.importer == "mmft.sweeps.run" and i.target == "mmft.sweeps.context"]
    assert inside_functions, "run_here imports SweepContext inside a function"
    assert {i.target for i in imports() if i.importer == "mmft.__main__"} == {"mmft.cli.main"}
    assert any(i.typing_only for i in imports())
