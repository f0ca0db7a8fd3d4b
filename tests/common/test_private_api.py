"""Private names of other libraries: those that mmft uses exist with the expected parameters, and are used in one module only."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
from places import ROOT

from mmft.common import private_api

FUNCTIONS = {name: f for name, f in vars(private_api).items() if inspect.isfunction(f) and f.__module__ == private_api.__name__}


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- the names exist: one check for each function of private_api ----------------------------------------------------------


def check_save_checkpoint() -> None:
    from transformers import Trainer

    assert parameters(Trainer._save_checkpoint)[:3] == ["self", "model", "trial"]


def check_load_checkpoint_weights() -> None:
    from transformers import Trainer

    names = parameters(Trainer._load_from_checkpoint)
    assert names[:2] == ["self", "resume_from_checkpoint"]
    others = list(inspect.signature(Trainer._load_from_checkpoint).parameters.values())[2:]
    assert all(p.default is not inspect.Parameter.empty for p in others), "a further argument is required"


def check_set_sync_gradients() -> None:
    from accelerate.state import GradientState

    assert parameters(GradientState._set_sync_gradients) == ["self", "sync_gradients"]
    state = GradientState()
    before = state.sync_gradients
    try:
        for value in (False, True):
            private_api.set_sync_gradients(state, value)
            assert GradientState().sync_gradients is value, "all instances share the value"
    finally:
        private_api.set_sync_gradients(state, before)


def check_kept_accelerator_state() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from transformers import TrainingArguments

    accelerator = Accelerator(cpu=True)
    device = accelerator.device
    with private_api.kept_accelerator_state():
        assert TrainingArguments(use_cpu=True).device == device
        assert not AcceleratorState._shared_state, "the reason for this function is gone: TrainingArguments clears nothing any more"
    assert AcceleratorState._shared_state and PartialState._shared_state and accelerator.device == device
    with accelerator.autocast():
        pass


def check_keep_graphs_whole() -> None:
    import torch._dynamo

    with torch._dynamo.config.patch(optimize_ddp=True):
        private_api.keep_graphs_whole()
        assert torch._dynamo.config.optimize_ddp is False


def check_trial_id() -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study()
    asked = study.ask()
    (frozen,) = study.get_trials()
    assert optuna.trial.Trial(study, private_api.trial_id(frozen)).number == asked.number


def check_sacrebleu_counts() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    for metric in (metrics.BLEU(), metrics.CHRF()):
        assert parameters(metric._extract_corpus_statistics) == ["hypotheses", "references"] and parameters(metric._compute_score_from_stats) == ["stats"]
        answers, references = ["a red circle on the left", "a star in the top corner"], [["a blue circle on the left", "a star in the center"]]
        counts, score = private_api.sacrebleu_counts(metric, answers, references)
        assert score([sum(column) for column in zip(*counts)]) == pytest.approx(metric.corpus_score(answers, references).score)


def check_hydra_callbacks() -> None:
    from hydra.types import HydraContext

    assert "callbacks" in parameters(HydraContext)
    callbacks = private_api.hydra_callbacks()
    assert callable(callbacks.on_job_start) and callbacks.callbacks == [], "no callbacks"


def check_attention_implementation() -> None:
    from transformers import Qwen2Config

    assert hasattr(Qwen2Config(), "_attn_implementation")
    for asked in ("eager", "sdpa"):
        assert private_api.attention_implementation(Qwen2Config(attn_implementation=asked)) == asked


def check_names_taken_for_experts() -> None:
    assert private_api.names_taken_for_experts("glm4v_moe") == {"gate", "gate_proj", "up_proj", "down_proj"}
    assert private_api.names_taken_for_experts("qwen3_vl_moe") == set() == private_api.names_taken_for_experts("")


def check_onednn_linear() -> None:
    import torch

    linear = private_api.onednn_linear()
    assert linear is not None, "torch.ops.mkldnn._linear_pointwise is gone: linear layers over few rows are slower on AMD processors"
    x, weight, bias = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((5, 40), (70, 40), (70,)))
    wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (linear(x, weight, bias) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (linear(x, weight, None) - (wanted - bias)).abs().max() <= 1e-5 * wanted.abs().max()


def check_policy_log_probs() -> None:
    trainer = pytest.importorskip("trl").GRPOTrainer
    names = parameters(trainer._get_per_token_logps_and_entropies)
    assert names[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"] and {"num_images", "num_tiles", "pixel_values"} <= set(names)


def check_policy_counts() -> None:
    assert {"_metrics", "_step", "_buffered_inputs"} <= attributes_of(pytest.importorskip("trl").GRPOTrainer)


check_policy_state = check_restore_policy = check_policy_counts


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_private_names_exist_with_the_expected_parameters(name):
    reason = " ".join((FUNCTIONS[name].__doc__ or "").partition("Reason: ")[2].split())
    assert name in CHECKS, f"tests/common/test_private_api.py has no check_{name} for mmft.common.private_api.{name}"
    try:
        CHECKS[name]()
    except (AttributeError, ImportError, TypeError, AssertionError) as error:
        pytest.fail(f"mmft.common.private_api.{name} no longer fits the installed library: {error!r}. It is needed because: {reason}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_gives_a_reason_and_versions(name):
    doc = FUNCTIONS[name].__doc__ or ""
    assert re.match(r"`[\w.]+`(, `[\w.]+`)* \([\w-]+ [\d.]+( to [\d.]+)?\): ", doc), f"{name}: begins with `private name` (package versions): purpose"
    assert "Reason: " in doc, f"{name}: says why no public name serves"


def test_a_changed_private_name_is_reported_with_the_function_and_its_reason(monkeypatch):
    from accelerate.state import GradientState

    monkeypatch.delattr(GradientState, "_set_sync_gradients")
    with pytest.raises(pytest.fail.Exception, match=r"private_api\.set_sync_gradients no longer fits.*because: all Accelerators"):
        test_the_private_names_exist_with_the_expected_parameters("set_sync_gradients")


# --- nothing else uses private names ------------------------------------------------------------------------------------

# expression in the source -> why it may stay where it is
ALLOWED = {
    "os._exit": "a documented function of Python, in spite of its name",
    "from torch.utils._python_dispatch import TorchDispatchMode": "torch documents this base class, and this module as its place",
    "from _typeshed import DataclassInstance": "for type checkers only; never imported",
    "hashlib._Hash": "an annotation, never evaluated; hashlib has no public name for the type",
}


NAMED_TUPLE = ("_replace", "_asdict", "_make", "_fields")  # documented, in spite of their names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in NAMED_TUPLE


def own_names(tree: ast.Module) -> set[str]:
    """Names that a module defines itself, attributes of its classes included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            names.add(node.attr)
    return names


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, expression) of each use of a private name that the module does not define."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        if any(is_private(name) and name not in own for name in names):
            yield node.lineno, ast.unparse(node)


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "mmft").rglob("*.py")):
        if path.name != "private_api.py":
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_private_names_of_other_libraries_are_used_in_private_api_only():
    uses = [(f"{name}:{line}: {expression}", expression) for name, tree in sources() for line, expression in private_uses(tree)]
    print(f"{len(FUNCTIONS)} functions in private_api.py; {len(uses)} uses of private names elsewhere, by {len(ALLOWED)} entries of the allow-list")
    wrong = [text for text, expression in uses if expression not in ALLOWED]
    assert not wrong, "\n".join(wrong)
    assert ALLOWED.keys() <= {expression for _, expression in uses}, "an entry of the allow-list is no longer used"


def test_the_scan_finds_private_uses():
    source = """
import hydra._internal.utils
from hydra._internal.callbacks import Callbacks
from torch.nn.modules.dropout import _DropoutNd
def f(self, x):
    getattr(x, "_attn_implementation", None)
    self._tr_loss
    x._own, x.__dict__, x._other
    g()._call()
def _own(): ...
"""
    found = [expression for _, expression in private_uses(ast.parse(source))]
    assert sorted(found) == sorted([
        "import hydra._internal.utils", "from hydra._internal.callbacks import Callbacks", "from torch.nn.modules.dropout import _DropoutNd",
        "getattr(x, '_attn_implementation', None)", "self._tr_loss", "x._other", "g()._call",
    ])  # fmt: skip


def classes_over_libraries() -> Iterator[tuple[str, str]]:
    """(module, class) of the classes in mmft with a base class from an installed library."""
    for name, tree in sources():
        imported = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported |= {alias.asname or alias.name: node.module for alias in node.names}
            elif isinstance(node, ast.Import):
                imported |= {(alias.asname or alias.name).split(".")[0]: alias.name for alias in node.names}
        for node in tree.body:
            if not isinstance(node, ast.ClassDef):
                continue
            roots = [imported.get(ast.unparse(base).split(".")[0].split("[")[0], "").split(".")[0] for base in node.bases]
            if any(root and root not in (*sys.stdlib_module_names, "typing_extensions", "mmft") for root in roots):
                yield name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), node.name


def attributes_of(cls: type) -> set[str]:
    """Names that the methods of a class assign to self."""
    try:
        return own_names(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    except (OSError, TypeError):  # a class without Python source
        return set()


def test_no_class_overrides_a_private_name_of_its_library():
    found = list(classes_over_libraries())
    assert ("mmft.training.trainer", "SupervisedTrainer") in found
    wrong = []
    for module, name in found:
        cls = getattr(importlib.import_module(module), name)
        own = {n for n in attributes_of(cls) if is_private(n)}
        for base in cls.__mro__[1:-1]:
            if not base.__module__.startswith("mmft.") and (overridden := own & (vars(base).keys() | attributes_of(base))):
                wrong.append(f"{module}.{name} overrides {base.__module__}.{base.__name__}: {', '.join(sorted(overridden))}")
    assert not wrong, "\n".join(wrong)
