"""The command line: fast answers without torch, one line for a mistake, nothing executed from a config."""

import importlib.util
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from places import ROOT

from mmft.cli import parse
from mmft.common.errors import UserError
from mmft.config import compose, groups, validate
from mmft.config.build import build
from mmft.config.groups import group_options
from mmft.config.guard import moved_targets
from mmft.config.guard.targets import resolve
from mmft.config.key_types import arguments
from mmft.config.plain import to_plain
from mmft.config.snapshot import snapshot

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


def test_the_help_fits_into_80_columns(mmft):
    code, out, _ = mmft("--help", output_dir=False)
    assert code == 0 and max(map(len, out.splitlines())) <= 80


def test_any_key_of_the_libraries_can_be_set_without_plus(mmft):
    code, out, _ = mmft("--cfg", "job", "trainer.adam_beta2=0.95", "lora.use_rslora=true", "generation.top_p=0.9", "generation.do_sample=true", output_dir=False)
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
    from mmft.training.arguments import training_settings

    cfg = compose.compose([f"experiment={name}"])
    family, source = build(cfg.model, "model"), build(cfg.data, "data")
    args, _ = training_settings(to_plain(cfg.trainer), output_dir=str(tmp_path), use_cpu=True)
    build(cfg.logger, "logger")
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


def test_a_users_file_precedes_a_shipped_one_of_the_same_name(mmft, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "default.yaml").write_text("r: 3\nscope: vision\n", encoding="utf-8")
    assert compose.compose([], str(tmp_path)).lora == {"r": 3, "scope": "vision"}
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nseed: 5\n", encoding="utf-8")
    cfg = compose.compose([], str(tmp_path), "mine")
    assert (cfg.seed, cfg.lora.r, cfg.trainer.num_train_epochs) == (5, 3, 2)


def test_options_composed_once_are_copied_and_read_again_after_an_edit(tmp_path, monkeypatch):
    folder = shutil.copytree(compose.CONFIG_DIR, tmp_path / "conf")
    for module in (compose, groups, validate):
        monkeypatch.setattr(module, "CONFIG_DIR", folder)
    called = []
    by_hydra = compose._by_hydra
    monkeypatch.setattr(compose, "_by_hydra", lambda *args: called.append(args) or by_hydra(*args))
    first = compose.compose(["lora.r=5", "model.processor={a: 1}"])
    first.trainer.max_steps = 3
    second = compose.compose(["lora.lora_alpha=9"])
    assert (second.lora.r, second.model.processor, second.trainer.max_steps) == (16, {}, -1) and len(called) == 1
    file = folder / "lora" / "default.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("r: 16", "r: 24"), encoding="utf-8")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text(encoding="utf-8") + "more: 1\n", encoding="utf-8")
    assert compose.compose([]).lora.r == 24 and "more" in groups.top_level() and len(called) == 2
    compose.compose(["hydra.verbose=true"]), compose.compose(["hydra.verbose=true"]), compose.compose([], str(tmp_path)), compose.compose([], str(tmp_path))
    assert len(called) == 6, "keys of Hydra and a user's folder are composed each time"
    for place in (tmp_path, tmp_path, folder):
        monkeypatch.chdir(place)
        assert compose.compose_hydra([]).hydra.runtime.cwd == str(place)
    assert len(called) == 8 and "hydra" not in compose.compose([])


def test_a_snapshot_composes_again_to_the_same_config(tmp_path):
    cfg = compose.compose(["lora.r=8", "trainer.adam_beta2=0.9", "experiment=debug"])
    (tmp_path / "snapshot.yaml").write_text(snapshot(cfg), encoding="utf-8")
    again = compose.compose([], config_dir=str(tmp_path), config_name="snapshot")
    assert to_plain(again) == to_plain(cfg)


SNAPSHOTS = [
    # targets as a run's snapshot.yaml named them before their modules moved
    {"task": "mmft.tasks.train.Train", "data": "mmft.data.shapes.Shapes", "model": "mmft.models.qwen2vl.Qwen2VL"},
    {"task": "mmft.tasks.train.Train", "data": "mmft.data.table.Table", "model": "mmft.models.family.Family"},
    {"task": "mmft.tasks.prepare.Prepare", "data": "mmft.data.messages.OpenAIMessages", "model": "mmft.models.llava.Llava"},
]


@pytest.mark.parametrize("targets", SNAPSHOTS, ids=lambda t: t["data"])
def test_a_snapshot_with_earlier_module_names_composes(tmp_path, targets):
    data = {"Table": ["data=table", "data.path=x"], "Shapes": [], "OpenAIMessages": ["data=messages", "data.path=x"]}[targets["data"].split(".")[-1]]
    cfg = compose.compose([f"task={targets['task'].split('.')[-1].lower()}", *data])
    plain = yaml.safe_load(snapshot(cfg))
    for section, target in targets.items():
        plain[section]["_target_"] = target
    (tmp_path / "snapshot.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    again = compose.compose([], config_dir=str(tmp_path), config_name="snapshot")
    assert {again.task._target_, again.data._target_} == {cfg.task._target_, cfg.data._target_}
    assert again.model._target_ == f"mmft.models.families.{targets['model'].split('.')[-2].replace('family', 'base')}.{targets['model'].split('.')[-1]}"
    assert type(build(again.data, "data")).__name__ == targets["data"].split(".")[-1]
    assert "mmft.tasks" not in snapshot(again)


def test_every_moved_module_has_a_successor():
    for old, new in moved_targets.MOVED.items():
        assert importlib.util.find_spec(new) is not None, old
    assert moved_targets.current("mmft.tasks.train.Train") == "mmft.verbs.train.Train"
    assert moved_targets.current("mmft.data.sources.table.Table") == "mmft.data.sources.table.Table"


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
    assets = ROOT / "mmft" / "assets"  # the tiny model: data of the package mmft
    code = {".".join(p.relative_to(ROOT).parts) for p in [ROOT / "mmft", *(ROOT / "mmft").rglob("*")] if p.is_dir() and p != assets and assets not in p.parents}
    conf = {".".join(("mmft", *p.relative_to(ROOT).parts)) for p in [ROOT / "conf", *(ROOT / "conf").rglob("*")] if p.is_dir()}
    assert listed == {name for name in code | conf if "__pycache__" not in name}


def test_verbs_come_with_a_line_each():
    assert set(parse.verbs()) >= {"train", "prepare"}
    assert all(len(text) > 10 for text in parse.verbs().values())
