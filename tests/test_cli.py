"""The command line: fast answers without torch, one line for a mistake, nothing executed from a config."""

import re
import subprocess
import sys
import time

import pytest
import yaml
from places import ROOT

from mmft.cli import parse
from mmft.common.errors import UserError
from mmft.config import compose
from mmft.config.build import build
from mmft.config.guard.targets import resolve
from mmft.config.library_keys import group_options
from mmft.config.snapshot import snapshot
from mmft.config.validate import arguments, to_plain

WITHOUT_TORCH = "import sys; from mmft.__main__ import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"


def fresh(*words: str) -> tuple[int, str, str, float]:
    """The command in a new process that must not import torch."""
    started = time.time()
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, timeout=60)
    assert "AssertionError" not in done.stderr
    return done.returncode, done.stdout, done.stderr, time.time() - started


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--help"], "usage: mmft"),
        (["train", "--help"], "mmft train:"),
        (["--cfg", "job", "lora.r=64"], "r: 64"),
        (["--version"], "mmft 0."),
    ],
)
def test_help_and_cfg_answer_without_torch(words, expected):
    code, out, err, seconds = fresh(*words)
    assert code == 0 and expected in out
    assert seconds < 10  # the promise is 2 s on an idle machine; this only catches an import of torch


MISTAKES = [
    (["lora.rr=3"], "lora.rr: no such key. Did you mean lora.r?"),
    (["trainer.lerning_rate=1e-4"], "Did you mean trainer.learning_rate?"),
    (["modle=tiny"], "Did you mean model?"),
    (["model=tinny"], "Did you mean tiny?"),
    (["data=shape"], "Did you mean shapes?"),
    (["data.splitz=1"], "Did you mean data.splits?"),
    (["generation.max_new_token=3"], "Did you mean generation.max_new_tokens?"),
    (["model.quantization.load_in_8bits=true"], "Did you mean model.quantization.load_in_8bit?"),
    (["evaluation.max_sample=3"], "Did you mean evaluation.max_samples?"),
    (["prepair"], "Did you mean prepare?"),
    (["--multi-run"], "Did you mean --multirun?"),
    (["lora.r=x"], "lora.r=x: must be int"),
    (["trainer.max_steps=few"], "trainer.max_steps=few: must be int"),
    (["seed=a"], "seed=a: must be int"),
    (["lora.r=1,2"], "add -m"),
    (["lora.target_modules=[a"], "cannot be read as key=value"),
    (["trainer.output_dir=x"], "mmft sets this itself"),
    (["trainer.hub_token=x"], "is a secret"),
    (["--config-dir", "nowhere"], "no such directory"),
    (["-m", "lora.r=2,x"], "lora.r=x: must be int"),
    (["-m", "model=tiny,tinny"], "Did you mean tiny?"),
]


@pytest.mark.parametrize("words, expected", MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_mistake_is_one_line_with_the_nearest_name(mmft, words, expected):
    code, out, err = mmft(*words, output_dir=False)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1 and "Traceback" not in err and "++" not in err


def test_a_mistake_is_answered_without_torch():
    code, _, err, _ = fresh("trainer.lerning_rate=1")
    assert code == 2 and "trainer.learning_rate" in err


def test_any_key_of_the_libraries_can_be_set_without_plus(mmft):
    code, out, _ = mmft("--cfg", "job", "trainer.adam_beta2=0.95", "lora.use_rslora=true", "generation.top_p=0.9", output_dir=False)
    cfg = yaml.safe_load(out)
    assert code == 0
    assert (cfg["trainer"]["adam_beta2"], cfg["lora"]["use_rslora"], cfg["generation"]["top_p"]) == (0.95, True, 0.9)


def test_numbers_that_yaml_reads_as_text_become_numbers():
    assert arguments({"a": "1e-4", "b": "x"}, {"a": "float", "b": "str"}) == {"a": 1e-4, "b": "x"}


def test_the_model_brings_its_collator_and_the_user_may_choose_another():
    assert compose.compose(["model=blip2"]).collator._target_.endswith("CaptionCollator")
    assert compose.compose(["model=qwen2vl"]).collator._target_.endswith("ChatCollator")
    assert compose.compose(["model=qwen2vl", "collator=caption"]).collator._target_.endswith("CaptionCollator")


def every_option() -> list[str]:
    return [f"{group}={option}" for group, options in group_options().items() for option in options]


@pytest.mark.parametrize("word", every_option())
def test_every_shipped_option_composes_and_its_keys_are_known(word):
    group, option = word.split("=")
    text = (compose.CONFIG_DIR / group / f"{option}.yaml").read_text(encoding="utf-8")
    given = [f"{group}.{key}=here" for key in re.findall(r"^(\w+): \?\?\?", text, re.M)]  # what only the user can say
    cfg = compose.compose([word, *given])
    assert cfg.seed == 42


@pytest.mark.parametrize("name", [p.stem for p in sorted((compose.CONFIG_DIR / "experiment").glob("*.yaml"))])
def test_every_preset_builds_its_light_objects(name, tmp_path):
    from mmft.training.trainer import training_settings

    cfg = compose.compose([f"experiment={name}"])
    family, source = build(cfg.model), build(cfg.data)
    args, _ = training_settings(to_plain(cfg.trainer), output_dir=str(tmp_path), use_cpu=True)
    build(cfg.logger)
    assert family.path and source.name and args.per_device_train_batch_size >= 1


SEEDS = {  # the figures of the recipes, typed from the write-ups
    "blip2_football": {"lora.r": 16, "lora.lora_alpha": 32, "lora.lora_dropout": 0.05, "trainer.learning_rate": 5e-5,
                       "trainer.per_device_train_batch_size": 2, "trainer.num_train_epochs": 11, "model.quantization.load_in_8bit": True},
    "llava_cc3m": {"lora.r": 4, "lora.lora_alpha": 8, "lora.lora_dropout": 0.05, "trainer.learning_rate": 1e-3, "trainer.max_steps": 800,
                   "trainer.per_device_train_batch_size": 6, "trainer.lr_scheduler_type": "cosine", "trainer.max_grad_norm": 0.3,
                   "trainer.save_steps": 200, "lora.target_modules": ["q_proj", "v_proj"], "lora.modules_to_save": ["multi_modal_projector"]},
    "qwen2vl_coco500": {"lora.r": 64, "lora.lora_alpha": 16, "lora.lora_dropout": 0.05, "trainer.learning_rate": 1e-4,
                        "trainer.per_device_train_batch_size": 2, "trainer.gradient_accumulation_steps": 2, "trainer.num_train_epochs": 2,
                        "trainer.save_steps": 100, "data.limit": 500, "data.splits.validation": 4, "data.splits.by": "last",
                        "model.processor.max_pixels": 280 * 280, "collator.max_length": 8192},
}  # fmt: skip
SEEDS["qwen2vl_coco500_swanlab"] = {**SEEDS["qwen2vl_coco500"], "logger._target_": "mmft.loggers.swanlab.SwanLab"}


@pytest.mark.parametrize("name", SEEDS)
def test_presets_hold_the_figures_of_their_recipes(name):
    from omegaconf import OmegaConf

    cfg = compose.compose([f"experiment={name}"])
    assert {key: to_plain(OmegaConf.select(cfg, key)) for key in SEEDS[name]} == SEEDS[name]


def test_a_users_own_groups_stand_beside_the_shipped_ones(mmft, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [tiny, _self_]\npath: ./mine\n", encoding="utf-8")
    code, out, _ = mmft("--config-dir", str(tmp_path), "model=mine", "--cfg", "job", output_dir=False)
    assert code == 0 and yaml.safe_load(out)["model"]["path"] == "./mine"
    assert yaml.safe_load(out)["collator"]["_target_"].endswith("ChatCollator")


def test_a_snapshot_composes_again_to_the_same_config(tmp_path):
    cfg = compose.compose(["lora.r=8", "trainer.adam_beta2=0.9", "experiment=debug"])
    (tmp_path / "snapshot.yaml").write_text(snapshot(cfg), encoding="utf-8")
    again = compose.compose([], config_dir=str(tmp_path), config_name="snapshot")
    assert to_plain(again) == to_plain(cfg)


PAYLOADS = [
    "os.system", "mmft.os.getcwd", "mmft.runs.directory.os.system", "mmft.config.compose.importlib.import_module", "builtins.eval", "subprocess.run",
    "mmft.runs.directory.Run.__init__", "mmft.config.compose.__builtins__", "hydra.utils.instantiate", "mmft", "mmft..run", "mmft.runs.directory", "..os", 3, "",
    "mmft.runs.environment.subprocess.run", "pathlib.Path", "mmft.runs.directory.Path", "mmft.runs.directory.shutil.rmtree", "mmft.nowhere.Thing", "mmft.runs.directory.Nothing",
]  # fmt: skip


@pytest.mark.parametrize("target", PAYLOADS)
def test_a_target_that_is_not_mmfts_own_is_refused(target):
    with pytest.raises(UserError, match="_target_"):
        resolve(target)


def test_a_target_hidden_deep_in_a_config_is_refused_before_anything_is_built(mmft, tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "logger").mkdir()
    (tmp_path / "logger" / "evil.yaml").write_text(
        "_target_: mmft.loggers.multi.Multi\nloggers:\n  a: {_target_: os.mkdir, path: " + marker.as_posix() + "}\n", encoding="utf-8"
    )
    code, _, err = mmft("--config-dir", str(tmp_path), "logger=evil", output_dir=False)
    assert code == 2 and "logger.loggers.a: _target_ os.mkdir is refused" in err
    assert not marker.exists()


def test_a_package_named_in_the_environment_is_allowed(tmp_path, monkeypatch):
    (tmp_path / "minepkg.py").write_text("class Thing:\n    def __init__(self, a: 'int' = 1): self.a = a\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="refused"):
        build({"_target_": "minepkg.Thing"})
    monkeypatch.setenv("MMFT_PACKAGES", "other, minepkg")
    assert build({"_target_": "minepkg.Thing", "a": 5}).a == 5


def test_every_folder_with_code_or_config_is_a_package_of_the_wheel():
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.S).group(1)
    listed = set(re.findall(r'"([\w.]+)"', listed))
    code = {".".join(p.relative_to(ROOT).parts) for p in [ROOT / "mmft", *(ROOT / "mmft").rglob("*")] if p.is_dir()}
    conf = {".".join(("mmft", *p.relative_to(ROOT).parts)) for p in [ROOT / "conf", *(ROOT / "conf").rglob("*")] if p.is_dir()}
    assert listed == {name for name in code | conf if "__pycache__" not in name}


def test_verbs_come_with_a_line_each():
    assert set(parse.verbs()) >= {"train", "prepare"}
    assert all(len(text) > 10 for text in parse.verbs().values())
