"""Every key of the libraries' classes is effective, managed or refused: the table against the installed libraries, and keys that act."""

import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
import torch
from places import ROOT

from mmft.common.errors import UserError
from mmft.config import compose, key_table, library_keys
from mmft.config.build import build
from mmft.config.plain import to_plain
from mmft.evaluation.evaluate import Evaluator
from mmft.models.load import build_collator, load_model

ALL = [(section, key) for section, keys in library_keys.sections().items() for key in keys if key not in library_keys.OWN_KEYS - {"r"}]


def of_status(wanted: str) -> list[tuple[str, str]]:
    return [(section, key) for section, key in ALL if key_table.status(section, key)[0] == wanted]


@pytest.mark.parametrize("section", key_table.CLASSES)
def test_every_key_of_the_installed_library_is_in_the_table_once(section):
    keys = [key for s, key in ALL if s == section]
    assert len(keys) >= 8
    unknown = [key for key in keys if key_table.status(section, key)[0] == "unknown"]
    assert not unknown, f"new in the installed {key_table.CLASSES[section][1]}: {unknown}; find out whether they act, and add them to mmft/config/key_table.py"
    listed = [*key_table.EFFECTIVE[section], *key_table.MANAGED[section], *key_table.UNSUPPORTED[section]]
    assert len(listed) == len(set(listed))


def test_the_keys_are_those_of_the_classes_themselves():
    """The files are read with ast; here the classes are imported."""
    import dataclasses

    from peft import LoraConfig
    from transformers import TrainingArguments

    fields = {f.name for f in dataclasses.fields(TrainingArguments) if not f.name.startswith("_") and f.init}
    assert fields - {"logging_dir"} <= set(library_keys.training_arguments())
    assert {f.name for f in dataclasses.fields(LoraConfig) if f.init} <= set(library_keys.lora_config())


@pytest.mark.parametrize(("section", "key"), of_status("managed") + of_status("unsupported"))
def test_a_key_that_does_not_act_is_refused_with_a_reason(section, key):
    with pytest.raises(UserError) as refused:
        key_table.check(section, {key: "x"}, {key: ""})
    message = str(refused.value)
    assert message.startswith(f"{section}.{key}") and "\n" not in message
    assert ("mmft sets this itself; " in message) != ("is not supported: " in message) and len(message) > len(section + key) + 35


def test_a_key_that_is_new_in_a_library_is_refused_and_an_unsupported_one_may_be_off():
    with pytest.raises(UserError, match="is new in the installed peft"):
        key_table.check("lora", {"use_tomorrow": True}, {"use_tomorrow": "bool"})
    key_table.check("trainer", {"use_liger_kernel": False, "liger_kernel_config": None, "include_for_metrics": []}, {})


REFUSED = [
    ("trainer.use_liger_kernel=true", "model.rewrites"), ("trainer.optim=galore_adamw", "needs the package galore-torch"),
    ("trainer.optim=schedule_free_adamw", "pip install schedulefree"), ("trainer.deepspeed=zero.json", "pip install deepspeed"), ("trainer.seed=3", "seed=... is a key of the top level"),
    ("trainer.push_to_hub=true", "mmft merge"), ("trainer.resume_from_checkpoint=x", "mmft resume"), ("lora.init_lora_weights=mica", "was not tested"),
    ("lora.loftq_config={loftq_bits: 4}", "is not supported"), ("lora.velora_config={a: 1}", "is not supported"), ("lora.use_qalora=true", "GPTQ"), ("generation.stop_strings=[a]", "tokenizer"),
    ("generation.num_beam_groups=2", "code on a hub"), ("generation.eos_token_id=3", "end tokens"), ("model.quantization.llm_int8_has_fp16_weight=true", "model.dtype=fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "expected"), REFUSED)
def test_a_command_with_such_a_key_is_one_line(mmft, word, expected):
    code, out, err = mmft(word, output_dir=False)
    assert code == 2 and expected in err and err.count("\n") == 1 and word.split("=")[0] in err, err


def test_the_refusal_needs_no_torch():
    started = time.process_time()
    program = "import sys; from mmft.cli.main import main; code = main(['trainer.use_liger_kernel=true']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "trainer.use_liger_kernel" in done.stderr and time.process_time() - started < 1


def test_the_page_of_keys_is_the_table():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import reference
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == reference.keys_page(), "run: python docs/reference.py"


# --- generation ----------------------------------------------------------------------------------------------------


@dataclass
class Tiny:
    evaluator: Evaluator
    model: torch.nn.Module
    known: dict[str, list[str]] = field(default_factory=dict)

    def answers(self, **keys):
        name = repr(sorted(keys.items()))
        if name not in self.known:
            torch.manual_seed(0)
            self.evaluator.generation = keys
            self.known[name] = [a.text for a in self.evaluator.generate(self.model)]
        return self.known[name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model and four held-out rows."""
    from mmft.data.prepare import prepared_data
    from mmft.data.selection import split_rows

    cfg = compose.compose(["data.pictures=20", "data.splits.validation=4", f"output_dir={tmp_path_factory.mktemp('keys').as_posix()}"])
    family = build(cfg.model, "model")
    loaded = load_model(family)
    collator = build_collator(cfg.collator, family, loaded)
    _, held_out = split_rows(prepared_data(cfg), to_plain(cfg)["evaluation"])
    return Tiny(Evaluator(held_out, collator, {"max_new_tokens": 8}, 4, 4, progress=False), loaded.model)


LIMIT = {"max_new_tokens": 12}
FULL = {**LIMIT, "min_new_tokens": 12}
SAMPLED = {**LIMIT, "do_sample": True, "top_k": 0, "temperature": 2.0}
BEAMS = {**LIMIT, "num_beams": 3}
GENERATION = {  # key -> (value, the other keys)
    "max_length": (60, {}), "max_new_tokens": (2, {}), "min_length": (400, LIMIT), "min_new_tokens": (12, LIMIT), "max_time": (1e-4, FULL),
    "do_sample": (True, {**LIMIT, "top_k": 0, "temperature": 3.0}), "num_beams": (3, {**LIMIT, "length_penalty": -5.0}), "temperature": (0.1, SAMPLED), "top_k": (2, SAMPLED), "top_p": (0.1, SAMPLED),
    "min_p": (0.8, SAMPLED), "top_h": (0.1, SAMPLED), "typical_p": (0.1, SAMPLED), "epsilon_cutoff": (0.05, SAMPLED), "eta_cutoff": (0.3, SAMPLED),
    "repetition_penalty": (5.0, FULL), "encoder_repetition_penalty": (5.0, FULL), "length_penalty": (-5.0, BEAMS),
    "no_repeat_ngram_size": (1, {**FULL, "max_new_tokens": 16, "min_new_tokens": 16}), "encoder_no_repeat_ngram_size": (1, FULL), "forced_eos_token_id": (41, {"max_new_tokens": 3}),
    "exponential_decay_length_penalty": ([1, 9.0], LIMIT), "sequence_bias": ([[[40], 50.0]], LIMIT), "watermarking_config": ({"bias": 20.0, "greenlist_ratio": 0.3}, LIMIT),
    "renormalize_logits": (True, {"max_new_tokens": 24, "num_beams": 4, "no_repeat_ngram_size": 1, "length_penalty": 2.0}), "bad_words_ids": ("FIRST", LIMIT), "suppress_tokens": ("FIRST", LIMIT),
    "begin_suppress_tokens": ("FIRST", LIMIT),
}  # fmt: skip


@pytest.mark.parametrize("key", GENERATION)
def test_a_generation_key_changes_the_answers(tiny, key):
    value, others = GENERATION[key]
    plain = tiny.answers(**(others or LIMIT))
    if value == "FIRST":  # the tokens that the model would write
        value = tiny.evaluator.collator.tokenizer.encode(plain[0])[:3]
        value = [[token] for token in value] if key == "bad_words_ids" else value
    assert tiny.answers(**{**others, key: value}) != plain


def test_remove_invalid_values_ignores_nan_logits(tiny):
    hook = tiny.model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([40]), float("nan")))
    try:
        torch.manual_seed(0)
        broken, mended = tiny.answers(max_new_tokens=4, repetition_penalty=1.0), tiny.answers(max_new_tokens=4, remove_invalid_values=True)
    finally:
        hook.remove()
    assert broken != mended and mended == tiny.answers(max_new_tokens=4)


def test_early_stopping_ends_a_beam_search_sooner(tiny):
    def passes(early):
        calls = []
        hook = tiny.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        try:
            tiny.answers(max_new_tokens=40, num_beams=3, length_penalty=2.0, early_stopping=early)
        finally:
            hook.remove()
        return len(calls)

    assert passes(True) < passes("never")


def test_cache_implementation_chooses_the_cache(tiny, monkeypatch):
    from transformers import cache_utils

    made, original = [], cache_utils.StaticCache.__init__
    monkeypatch.setattr(cache_utils.StaticCache, "__init__", lambda self, *args, **kwargs: (made.append(1), original(self, *args, **kwargs))[1])
    plain = tiny.answers(max_new_tokens=3)
    assert not made and tiny.answers(max_new_tokens=3, cache_implementation="static") == plain and made


# --- quantisation --------------------------------------------------------------------------------------------------

FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
QUANTIZATION = {  # key -> (value, the other keys)
    "load_in_8bit": (True, {}), "load_in_4bit": (True, {}), "llm_int8_threshold": (0.5, EIGHT), "llm_int8_skip_modules": (["lm_head", "gate_proj"], EIGHT),
    "bnb_4bit_compute_dtype": ("bfloat16", FOUR), "bnb_4bit_quant_type": ("fp4", {**FOUR, "bnb_4bit_quant_type": "nf4"}), "bnb_4bit_use_double_quant": (True, FOUR),
    "bnb_4bit_quant_storage": ("float32", FOUR),
}  # fmt: skip


@pytest.mark.parametrize("key", QUANTIZATION)
@pytest.mark.long
def test_a_quantisation_key_changes_the_weights_or_the_output(key):
    value, others = QUANTIZATION[key]

    def outputs(**keys):
        family = build(compose.compose([]).model, "model")
        family.quantization = keys
        model = load_model(family).model
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits.float()
        return logits, [str(p.dtype) for p in model.parameters()]

    plain, changed = outputs(**others), outputs(**{**others, key: value})
    assert not torch.equal(plain[0], changed[0]) or plain[1] != changed[1]


# --- training ------------------------------------------------------------------------------------------------------

E = ["evaluation.split=validation", "trainer.eval_strategy=steps", "trainer.eval_steps=1"]
S = ["trainer.save_strategy=steps", "trainer.save_steps=1"]
BEST = [*E, *S, "trainer.load_best_model_at_end=true", "trainer.learning_rate=1"]
WORKER = ["trainer.dataloader_num_workers=1"]
ACCUMULATED = ["trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=2"]
TRAINER = {  # key -> (words, the other words); the weights, the logged values or the files of the run change
    "per_device_train_batch_size": ("2", []), "num_train_epochs": ("2", ["trainer.max_steps=-1", "trainer.num_train_epochs=1"]), "max_steps": ("1", []), "learning_rate": ("1e-3", []),
    "lr_scheduler_type": ("constant", []), "lr_scheduler_kwargs": ("{min_lr: 5e-3}", ["trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr: 1e-4}"]),
    "warmup_steps": ("2", []), "optim": ("sgd", []), "optim_args": ("t_alpha=2,t_beta3=2,alpha=9.0", ["trainer.optim=ademamix"]), "weight_decay": ("0.5", []),
    "adam_beta1": ("0.5", []), "adam_beta2": ("0.5", []), "adam_epsilon": ("0.1", []), "gradient_accumulation_steps": ("2", []), "max_grad_norm": ("0.001", ["trainer.optim=sgd"]),
    "label_smoothing_factor": ("0.3", []), "neftune_noise_alpha": ("20", []), "train_sampling_strategy": ("group_by_length", []), "logging_strategy": ("no", []),
    "logging_steps": ("2", ["trainer.logging_first_step=false"]), "logging_first_step": ("false", ["trainer.logging_steps=2"]), "include_num_input_tokens_seen": ("true", []), "skip_memory_metrics": ("false", []), "per_device_eval_batch_size": ("1", E),
    "eval_strategy": ("epoch", E), "eval_steps": ("2", E), "eval_delay": ("2", E), "eval_on_start": ("true", E), "save_strategy": ("steps", ["trainer.save_steps=1"]),
    "save_steps": ("2", S), "save_total_limit": ("1", S), "save_only_model": ("true", S), "load_best_model_at_end": ("true", [*E, *S, "trainer.greater_is_better=true"]),
    "greater_is_better": ("true", BEST), "accelerator_config": ("{use_seedable_sampler: false}", []), "dataloader_drop_last": ("true", ["trainer.per_device_train_batch_size=5", "trainer.max_steps=4"]),
}  # fmt: skip
BASE = ["data.pictures=20", "data.splits.validation=4", "logger=none", "evaluation.split=null", "evaluation.base=false", "trainer.max_steps=2", "audit=false",
        "trainer.per_device_train_batch_size=4", "evaluation.samples=0", "lora.r=4", "trainer.learning_rate=1e-2", "trainer.logging_steps=1", "trainer.warmup_steps=0",
        "generation.max_new_tokens=2"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run leaves: its weights, logged values and files; equal commands run once."""
    import hashlib
    import json

    from mmft.cli.main import main

    home, known = tmp_path_factory.mktemp("trained"), {}

    def run(*words):
        words = tuple({w.split("=", 1)[0]: w for w in [*BASE, *words]}.values())
        if words not in known:
            folder = home / str(len(known))
            assert main([*words, f"output_dir={home / 'shared'}", f"run_dir={folder}"]) == 0, words
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if (folder / "metrics.jsonl").is_file() else []
            logged = [{k: v for k, v in row.items() if "second" not in k and "runtime" not in k} for row in rows]
            files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
            known[words] = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(), logged, files
        return known[words]

    return run


@pytest.mark.long
@pytest.mark.parametrize("key", TRAINER)
def test_a_training_key_changes_the_run(trained, key):
    value, others = TRAINER[key]
    assert trained(*others, f"trainer.{key}={value}") != trained(*others)


# lora keys: key -> (value, the other words)
LORA = {
    "r": ("2", []), "target_modules": ("[q_proj]", []), "exclude_modules": ("[q_proj]", []), "lora_alpha": ("8", []), "lora_dropout": ("0.5", []), "bias": ("lora_only", []),
    "use_rslora": ("true", []), "modules_to_save": ("[norm]", []), "init_lora_weights": ("gaussian", []), "layers_to_transform": ("[0]", []), "rank_pattern": ("{q_proj: 2}", []),
    "alpha_pattern": ("{q_proj: 3}", []), "trainable_token_indices": ("[5,6,7,8,9]", []),
    "eva_config": ("{rho: 1.0}", ["lora.init_lora_weights=eva", "lora.r=2"]), "corda_config": ("{corda_method: kpm}", ["lora.init_lora_weights=corda"]),
    "lora_ga_config": ("{stable_gamma: 64}", ["lora.init_lora_weights=lora_ga"]), "use_dora": ("true", []), "lora_bias": ("true", ["lora.target_modules=[q_proj,k_proj,v_proj]"]),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("key", LORA)
def test_a_lora_key_changes_the_run(trained, key):
    value, others = LORA[key]
    assert trained(*others, f"lora.{key}={value}") != trained(*others)


def settings_of(**keys):
    from mmft.training.arguments import training_settings

    return training_settings(keys, output_dir="unused")[0]


def test_keys_of_the_data_loader_reach_it(tmp_path):
    from transformers import Trainer

    args = settings_of(dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_prefetch_factor=5, dataloader_multiprocessing_context="spawn",
                       dataloader_in_order=False, dataloader_pin_memory=True, use_cpu=True)  # fmt: skip
    loader = Trainer(model=torch.nn.Linear(2, 2), args=args, train_dataset=[{"x": torch.zeros(2)}] * 4).get_train_dataloader()
    assert loader.num_workers == 1 and loader.persistent_workers and loader.prefetch_factor == 5 and not loader.in_order
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    if torch.cuda.is_available():  # without a GPU the Trainer leaves memory as it is
        assert settings_of(dataloader_pin_memory=True).dataloader_pin_memory


class Steps(torch.nn.Module):
    """A model that the Trainer itself can train."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


def calls_of(monkeypatch, name, **keys):
    """How often transformers.trainer calls its `name` while two steps are trained with the given keys."""
    import transformers.trainer as library

    calls, original = [], getattr(library, name)
    args = settings_of(max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **keys)
    with monkeypatch.context() as patch:
        patch.setattr(library, name, lambda *a, **k: (calls.append(a), original(*a, **k))[1])
        library.Trainer(model=Steps(), args=args, train_dataset=[{"x": torch.ones(2)}] * 8).train()
    return len(calls)


@pytest.mark.parametrize(("name", "keys"), [
    ("clear_device_cache", {"torch_empty_cache_steps": 1}), ("DebugUnderflowOverflow", {"debug": "underflow_overflow"}), ("enable_full_determinism", {"full_determinism": True}),
])  # fmt: skip
@pytest.mark.long
def test_a_key_makes_the_trainer_call_what_it_promises(monkeypatch, name, keys):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert calls_of(monkeypatch, name, **keys) > calls_of(monkeypatch, name) == 0
    finally:
        torch.use_deterministic_algorithms(before)


def test_keys_that_set_what_the_arguments_answer():
    assert settings_of(log_level="debug", use_cpu=True).get_process_log_level() == 10 != settings_of(use_cpu=True).get_process_log_level()
    assert settings_of(use_cpu=True).device.type == "cpu"
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        args = settings_of(**{name: True, f"{name}_kwargs": {"use_reentrant": False}}, use_cpu=True)
        assert args.activation_checkpointing and args.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_tokens_are_averaged_over_processes(monkeypatch):
    """The gradient is averaged over the processes, so with the token count of all of them the loss is multiplied by their number."""
    from types import SimpleNamespace

    from mmft.training import trainer as own

    monkeypatch.setattr(own, "grouped_loss", lambda model, inputs, smoothing, groups, pack: (torch.tensor(6.0), torch.tensor(2), {}))
    for average, expected in ((True, 9.0), (False, 3.0)):
        fake = SimpleNamespace(packing=None, args=SimpleNamespace(label_smoothing_factor=0, average_tokens_across_devices=average),
                               accelerator=SimpleNamespace(num_processes=3), _count_rows=lambda inputs: None, _count_losses=lambda *counted: None)  # fmt: skip
        assert own.SupervisedTrainer.compute_loss(fake, None, {}, num_items_in_batch=2).item() == expected


SPY = """
import json, os, sys, torch
made = {}
def spied(owner, name, keep):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        made.update({k: str(v) for k, v in kwargs.items() if k in keep})
        return original(*args, **kwargs)
    setattr(owner, name, call)
spied(torch.nn.parallel.DistributedDataParallel, "__init__", ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers"))
spied(torch.distributed, "init_process_group", ("backend", "timeout"))
from mmft.cli.main import main
code = main(sys.argv[1:])
if os.environ["RANK"] == "0":
    open(os.environ["MADE"], "w").write(json.dumps(made))
sys.exit(code)
"""


@pytest.mark.long
def test_keys_of_several_processes_reach_torch(tmp_path):
    import json
    import os
    import socket

    (tmp_path / "spy.py").write_text(SPY, encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["ddp_find_unused_parameters=true", "ddp_bucket_cap_mb=3", "ddp_broadcast_buffers=false", "ddp_backend=gloo", "ddp_timeout=77"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MADE": str(tmp_path / "made.json")}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", str(tmp_path / "spy.py"), *BASE, "model.device=cpu",
                           *(f"trainer.{w}" for w in words), f"output_dir={tmp_path / 'out'}"], capture_output=True, text=True, env=environment, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert (made["find_unused_parameters"], made["bucket_cap_mb"], made["broadcast_buffers"]) == ("True", "3", "False")
    # transformers 5.24 hands the timeout to processes on GPUs alone
    assert made["backend"] == "gloo" and made.get("timeout", "0:01:17") == "0:01:17" and settings_of(ddp_timeout=77).ddp_timeout_delta.total_seconds() == 77


ELSEWHERE = {  # keys that other tests set
    "trainer.metric_for_best_model": "tests/evaluation/test_metric_choice.py", "trainer.fsdp": "tests/training/test_distributed.py",
    "trainer.fsdp_config": "tests/training/test_distributed.py", "lora.target_parameters": "tests/adapters/test_experts.py", "lora.layers_pattern": "tests/adapters/test_adapters.py",
    **{f"trainer.{key}": "tests/training/test_compiled.py" for key in ("torch_compile", "torch_compile_backend", "torch_compile_mode")},
}  # fmt: skip
IN_PROCESS = (  # training keys of the tests above
    "torch_empty_cache_steps", "debug", "full_determinism", "log_level", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "average_tokens_across_devices", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_pin_memory", "fp16", "bf16", "tf32", "deepspeed", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout",
)  # fmt: skip


@pytest.mark.parametrize(("section", "key"), of_status("effective"))
def test_every_effective_key_has_a_test(section, key):
    tables = {"trainer": {*TRAINER, *IN_PROCESS}, "lora": LORA, "generation": {*GENERATION, "remove_invalid_values", "cache_implementation", "early_stopping"}, "model.quantization": QUANTIZATION}
    elsewhere = ELSEWHERE.get(f"{section}.{key}")
    assert key in tables[section] or elsewhere and key in (ROOT / elsewhere).read_text(encoding="utf-8"), f"{section}.{key}"


def test_fp16_and_bf16_without_a_gpu_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for key in ("fp16", "bf16", "tf32"):
        with pytest.raises(UserError, match=r"trainer"):
            settings_of(**{key: True})
