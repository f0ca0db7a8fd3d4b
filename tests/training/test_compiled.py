"""trainer.torch_compile: the same losses as without it, in every combination that is not refused; what cannot be compiled is one line."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from compared import draw, pairs
from interrupted import SMALL, assert_resumes_and_reproduces, start
from PIL import Image
from safetensors.torch import load_file
from small_models import GROUP

from mmft.adapters.methods import METHODS
from mmft.common.errors import UserError
from mmft.config import compose
from mmft.config.plain import to_plain
from mmft.rewrites.base import Replaced
from mmft.training import compiled
from mmft.training.compiled import Compile

FEW = ["trainer.max_steps=3", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.learning_rate=0.01", "evaluation.split=null", "logger=none", "audit=false"]
LORA = ["lora.r=2", "lora.lora_dropout=0"]
WITHOUT_DROPOUT = [word for word in SMALL if not word.startswith("lora.lora_dropout=")] + ["lora.lora_dropout=0"]


@pytest.fixture(autouse=True)
def without_traces():
    """pytest's handler of all levels makes torch write down every step of its tracing."""
    log = logging.getLogger("torch.__trace")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """15 rows whose answers have 3 to 45 words, below images of two sizes."""
    folder = tmp_path_factory.mktemp("uneven")
    lines = ["image,question,answer"]
    for n in range(15):
        Image.new("RGB", (56 + 28 * (n % 2), 56), (17 * n, 0, 200)).save(folder / f"{n}.png")
        lines.append(f"{n}.png,What is it?,{'a red square ' * (n + 1)}")
    (folder / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    return ["data=table", f"data.path={(folder / 'rows.csv').as_posix()}", "data.columns={image: image, text: answer, prompt: question}", "data.splits.validation=0"]


def trained(mmft, folder, *words):
    """(losses of the steps, weights, stdout) of a run in `folder`."""
    code, out, err = mmft(*words, f"run_dir={folder.as_posix()}")
    assert code == 0, err[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return [row["loss"] for row in rows if "loss" in row], load_file(adapter) if adapter.exists() else {}, out


def assert_same(one, other):
    """Losses and weights agree up to rounding, and something was learned."""
    assert other[0] == pytest.approx(one[0], abs=1e-4) and len(set(one[0])) > 1
    assert one[1].keys() == other[1].keys() and all(float((one[1][k] - other[1][k]).abs().max()) < 1e-3 for k in one[1])


def count_graphs(monkeypatch, backend="aot_eager"):
    """Let the backend of this name hand back each graph as torch traced it; returns a list of whether gradients were on, one for each graph."""
    traced, original = [], torch.compile

    def counting(graph, inputs):
        traced.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **more: original(function, **{**more, "backend": counting if more["backend"] == backend else more["backend"]}))
    return traced


def test_layers_are_compiled_once_for_all_lengths_and_for_training_alone(mmft, tmp_path, monkeypatch, uneven):
    """Seven batches of seven lengths, the last of one row; with a measurement behind, whose passes are not compiled."""
    words = [*uneven, *FEW, *LORA, "trainer.max_steps=7", "data.splits.validation=2", "evaluation.split=validation", "generation.max_new_tokens=2", "evaluation.base=false"]
    words.remove("data.splits.validation=0")
    words.remove("evaluation.split=null")
    words.remove("trainer.max_steps=3")
    traced = count_graphs(monkeypatch)
    plain = trained(mmft, tmp_path / "plain", *words)
    assert not traced
    own = trained(mmft, tmp_path / "compiled", *words, "trainer.torch_compile_backend=aot_eager")
    assert_same(plain, own)
    assert max(float(w.abs().max()) for k, w in own[1].items() if "lora_B" in k) > 1e-3
    assert "layers are compiled by aot_eager" in own[2] and all(traced)
    assert 2 <= len(traced) <= 5, "the line that is tried first, and two layers (the input of the first one has no gradient) with a mask and without one (one row needs no padding)"


@pytest.mark.long
def test_packed_rows_of_other_lengths_compile_nothing(small, mmft, tmp_path, monkeypatch, uneven):
    """Attention over each packed row alone stays between the graphs, whatever the lengths of the rows."""
    words = [f"model={GROUP['qwen2vl']}", f"model.path={small('qwen2vl').as_posix()}", *uneven, *FEW, *LORA, "trainer.packing=true", "trainer.max_steps=6"]
    words.remove("trainer.max_steps=3")
    traced = count_graphs(monkeypatch)
    plain = trained(mmft, tmp_path / "plain", *words)
    own = trained(mmft, tmp_path / "compiled", *words, "trainer.torch_compile_backend=aot_eager")
    assert "each packed row is computed by itself" in own[2]
    assert_same(plain, own)
    assert 2 <= len(traced) <= 6


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_resumed_and_a_reproduced_run_end_with_the_same_bytes(mmft, tmp_path):
    whole = tmp_path / "outputs" / "whole"
    code, _, err = mmft(*WITHOUT_DROPOUT, "trainer.torch_compile_backend=aot_eager", f"run_dir={whole.as_posix()}")
    assert code == 0 and err == "", err[-2000:]
    assert_resumes_and_reproduces(mmft, whole, tmp_path)


# --- by inductor, as a user has it: C++ on a CPU ---------------------------------------------------------------------

MORE = [
    [], ["model.rewrites=off"], ["vision_cache=off"], ["trainer.gradient_checkpointing=true"], ["lora=none", "trainer.learning_rate=0.001"],
    ["trainer.gradient_accumulation_steps=2", "trainer.fold_accumulation=off"],
]  # fmt: skip


FAMILIES = [("qwen2vl", more) for more in MORE] + [(kind, more) for kind in ("llava", "blip2", "smolvlm") for more in (MORE[0], MORE[3], MORE[4])]
FAMILIES.remove(("blip2", MORE[4]))  # OPT drops values in full training; see below


@pytest.mark.long
@pytest.mark.parametrize(("kind", "more"), FAMILIES, ids=lambda value: value if isinstance(value, str) else " ".join(value) or "as it is")
@pytest.mark.timeout(900)
def test_losses_of_compiled_layers(small, mmft, tmp_path, uneven, kind, more):
    words = [f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", *uneven, *FEW, *([] if "lora=none" in more else LORA), *more]
    words = [word for word in words if not (word == "trainer.learning_rate=0.01" and "lora=none" in more)]
    assert_same(trained(mmft, tmp_path / "plain", *words), trained(mmft, tmp_path / "compiled", *words, "trainer.torch_compile=true"))


@pytest.mark.long
def test_full_training_of_a_model_that_drops_values_is_one_line(small, mmft, tmp_path, uneven):
    code, _, err = mmft(f"model={GROUP['blip2']}", f"model.path={small('blip2').as_posix()}", *uneven, *FEW, "lora=none", "trainer.torch_compile=true", f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 2 and "mmft: trainer.torch_compile=true: dropout=0.1 of this model drops values in training" in err and "Traceback" not in err


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.timeout(900)
def test_every_method_of_adapters(small, mmft, tmp_path, uneven, name):
    options = {"oft": "{oft_block_size: 8}", "fourierft": "{n_frequency: 50}"}
    words = [f"model={GROUP['llava']}", f"model.path={small('llava').as_posix()}", *uneven, *FEW, *LORA, f"lora.method={name}", *([f"lora.options={options[name]}"] if name in options else [])]
    assert_same(trained(mmft, tmp_path / "plain", *words), trained(mmft, tmp_path / "compiled", *words, "trainer.torch_compile=true"))


@pytest.mark.long
@pytest.mark.parametrize("more", [["trainer.packing=true"], ["trainer.tokens_per_batch=250"], ["trainer.neftune_noise_alpha=5"], ["trainer.ema_decay=0.5"], ["trainer.lora_fa=true"]], ids=" ".join)
@pytest.mark.timeout(900)
def test_with_other_keys_of_training(small, mmft, tmp_path, uneven, more):
    words = [f"model={GROUP['qwen2vl']}", f"model.path={small('qwen2vl').as_posix()}", *uneven, *FEW, *LORA, *more]
    assert_same(trained(mmft, tmp_path / "plain", *words), trained(mmft, tmp_path / "compiled", *words, "trainer.torch_compile=true"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_in_half_precision(small, mmft, tmp_path, uneven):
    """bf16 rounds to 8 bits, and a compiled layer rounds less often: losses of about 6 agree to a few of these roundings."""
    words = [f"model={GROUP['qwen2vl']}", f"model.path={small('qwen2vl').as_posix()}", *uneven, *FEW, *LORA, "model.dtype=bf16"]
    plain, own = trained(mmft, tmp_path / "plain", *words), trained(mmft, tmp_path / "compiled", *words, "trainer.torch_compile=true")
    assert own[0] == pytest.approx(plain[0], rel=2**-7)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
@pytest.mark.timeout(900)
def test_preferences(mmft, tmp_path, objective):
    words = pairs(draw(tmp_path / "drawn"), f"objective={objective}", "trainer.max_steps=4", "trainer.logging_steps=1", "lora.lora_dropout=0")
    words = [word for word in words if word not in ("trainer.max_steps=6", "trainer.logging_steps=2")]
    assert_same(trained(mmft, tmp_path / "plain", *words), trained(mmft, tmp_path / "compiled", *words, "trainer.torch_compile=true"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_other_processes_compute_the_same_bytes_and_say_nothing(mmft, tmp_path):
    """A run in a process of its own; resumed and reproduced in this one, which sees other batches first."""
    out = tmp_path / "outputs"
    words = [word for word in WITHOUT_DROPOUT if word not in SMALL]
    process = start(out / "whole", out, *words, "trainer.torch_compile=true")
    printed, err = process.communicate(timeout=800)
    assert process.returncode == 0 and err == "", err[-3000:]
    assert "are compiled by inductor" in printed
    assert_resumes_and_reproduces(mmft, out / "whole", tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_processes(tmp_path, mmft):
    from test_distributed import WORDS, logged, torchrun

    out = tmp_path / "outputs"
    code, _, err = mmft(*WORDS, "trainer.per_device_train_batch_size=8", f"run_dir={(out / 'one').as_posix()}")
    assert code == 0, err
    done = torchrun(out, *WORDS, "trainer.per_device_train_batch_size=4", "trainer.torch_compile=true", "name=two")
    assert done.returncode == 0, done.stderr[-3000:]
    (two,) = out.glob("*_two")
    assert logged(two, "loss") == pytest.approx(logged(out / "one", "loss"), rel=1e-5) and logged(two, "eval_loss") == pytest.approx(logged(out / "one", "eval_loss"), rel=1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_points_of_a_sweep_train_one_after_another(mmft, tmp_path, monkeypatch):
    """More ranks than torch compiles one function for; each point begins anew."""
    said = []
    monkeypatch.setattr(compiled._Limit, "emit", lambda self, record: said.append(record.getMessage()))
    ranks = range(1, 11)
    words = [word for word in WITHOUT_DROPOUT if not word.startswith(("trainer.save", "trainer.max_steps"))] + ["trainer.max_steps=2", "trainer.logging_steps=1", "evaluation.split=null"]
    words.remove("trainer.logging_steps=2")
    code, out, err = mmft("-m", f"lora.r={','.join(map(str, ranks))}", *words, "trainer.torch_compile_backend=aot_eager", "name=swept")
    assert code == 0 and err == "" and not said, err[-3000:]
    assert out.count("since trainer.torch_compile would compile") == len(ranks)


# --- what is refused, and what fails -----------------------------------------------------------------------------------

REFUSED = [
    (["trainer.torch_compile=true"], "add lora.lora_dropout=0"),
    (["trainer.torch_compile=true", "lora.method=vera"], "add lora.lora_dropout=0"),
    (["trainer.torch_compile=true", "trainer.fsdp=full_shard"], "trainer.fsdp: takes the layers apart"),
    (["trainer.torch_compile=true", "model.quantization.load_in_4bit=true"], "was not tested with model.quantization.load_in_4bit"),
    (["lora.lora_dropout=0", "trainer.torch_compile_mode=reduce-overhead"], "modes with CUDA graphs were not tested"),
    (["lora.lora_dropout=0", "trainer.torch_compile_mode=defualt"], "Did you mean default?"),
    (["lora=none", "trainer.torch_compile_backend=eager", "trainer.torch_compile_mode=max-autotune-no-cudagraphs"], "is a mode of inductor"),
    (["lora=none", "trainer.torch_compile_backend=inductr"], "Did you mean inductor?"),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED)
def test_what_is_not_compiled_is_refused_by_name(words, expected):
    with pytest.raises(UserError, match="torch_compile") as refused:
        compiled.check_compile(to_plain(compose.compose(words)))
    assert expected in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("words", [[], ["lora=none", "trainer.torch_compile=true"], ["lora.method=ia3", "trainer.torch_compile=true"], ["trainer.torch_compile=true", "lora.lora_dropout=0"]])
def test_what_has_no_dropout_may_be_compiled(words):
    compiled.check_compile(to_plain(compose.compose(words)))


def test_rewards_and_a_missing_compiler_are_one_line(mmft, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    code, _, err = mmft("objective=grpo", "trainer.torch_compile=true", "logger=none")
    assert code == 2 and err.count("\n") == 1 and "trainer.torch_compile=True does not apply: compiled layers were not tested with TRL's GRPOTrainer" in err

    def compiler(function, **more):
        def broken(x):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

        return broken

    monkeypatch.setattr(torch, "compile", compiler)
    code, _, err = mmft("data.pictures=14", "data.splits.validation=2", *FEW, *LORA, "trainer.torch_compile=true", f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 2 and err.count("\n") == 1 and "No working C++ compiler found" in err and "install a C++ compiler (g++), or leave it out" in err


def test_a_layer_that_cannot_be_compiled_is_one_line(mmft, tmp_path, monkeypatch):
    original = torch.compile

    def failing(graph, inputs):
        raise NotImplementedError("no kernel for this\nand a long story")

    def compile_late(function, **more):
        return function if function is compiled._probe else original(function, **{**more, "backend": failing})

    monkeypatch.setattr(torch, "compile", compile_late)
    code, _, err = mmft("data.pictures=14", "data.splits.validation=2", *FEW, *LORA, "trainer.torch_compile=true", f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 2 and err.count("\n") == 1 and "torch cannot compile this model's layers: no kernel for this; leave it out" in err, err


def test_a_model_that_drops_values_itself_is_refused(small):
    model, _, _ = small.load("llava")
    layer = model.model.language_model.layers[0]
    layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="attention_dropout=0.1 of this model drops values"):
        compiled.compile_layers(model, Replaced(), Compile("eager", None))
    assert not model.training and "forward" not in vars(layer)
    layer.self_attn.attention_dropout = 0.0
    assert compiled.compile_layers(model, replaced := Replaced(), Compile("eager", None)) == len(model.model.language_model.layers)
    replaced.remove()
    assert "forward" not in vars(layer)
    with pytest.raises(UserError, match="finds no layers of a language model"):
        compiled.compile_layers(torch.nn.Linear(2, 2), Replaced(), Compile("eager", None))


def test_a_function_that_is_compiled_too_often_is_told_once(caplog):
    torch.compiler.reset()
    compiled._quieten()
    with caplog.at_level(logging.WARNING, "mmft"), torch._dynamo.config.patch(recompile_limit=2):
        logging.getLogger("mmft").propagate = True
        function = torch.compile(lambda x, n: x * n, backend="eager", dynamic=False)
        for n in range(6):
            function(torch.ones(n + 2), 2)
    assert [record.getMessage() for record in caplog.records if "torch has compiled the layers as often as it does" in record.getMessage()]


def test_a_quantised_base_is_refused_before_anything_is_compiled():
    with pytest.raises(UserError, match="not tested over a quantised base"):
        compiled.check_compiler(Compile("inductor", None), torch.device("cpu"), quantized=True)


def test_points_that_compile_train_alone():
    from mmft.joint.partition import why_alone

    assert "trainer.torch_compile" in why_alone(to_plain(compose.compose(["trainer.torch_compile=true"])))
