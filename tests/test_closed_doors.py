"""No code from a config or a folder, no secret in a file: each payload carries a mark that must not appear."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmft.common.errors import UserError
from mmft.config import compose
from mmft.config.guard import secrets
from mmft.config.guard.targets import resolve
from mmft.config.plain import to_plain

ROOT = Path(__file__).resolve().parents[1]

# --- what a config may build --------------------------------------------------------------------------------------

# MARK is a path: a payload that has its way makes a folder or a file of that name, or removes the folder KEPT.
PAYLOADS = {
    "os.system": {"_target_": "os.system", "command": "mkdir MARK"},
    "os.mkdir": {"_target_": "os.mkdir", "path": "MARK"},
    "os.makedirs": {"_target_": "os.makedirs", "name": "MARK"},
    "posix.system": {"_target_": "posix.system", "command": "mkdir MARK"},
    "subprocess.run": {"_target_": "subprocess.run", "args": ["mkdir", "MARK"]},
    "subprocess.Popen": {"_target_": "subprocess.Popen", "args": ["mkdir", "MARK"]},
    "subprocess.getoutput": {"_target_": "subprocess.getoutput", "cmd": "mkdir MARK"},
    "builtins.eval": {"_target_": "builtins.eval", "_args_": ["__import__('os').mkdir('MARK')"]},
    "builtins.exec": {"_target_": "builtins.exec", "_args_": ["import os; os.mkdir('MARK')"]},
    "builtins.open": {"_target_": "builtins.open", "file": "MARK", "mode": "w"},
    "builtins.__import__": {"_target_": "builtins.__import__", "name": "antigravity"},
    "pathlib.Path.mkdir": {"_target_": "pathlib.Path.mkdir", "self": "MARK"},
    "shutil.rmtree": {"_target_": "shutil.rmtree", "path": "KEPT"},
    "shutil.copytree": {"_target_": "shutil.copytree", "src": "KEPT", "dst": "MARK"},
    "pickle.loads": {"_target_": "pickle.loads", "data": "cos\nmkdir\n(VMARK\ntR."},
    "torch.load": {"_target_": "torch.load", "f": "MARK", "weights_only": False},
    "runpy.run_path": {"_target_": "runpy.run_path", "path_name": "SCRIPT"},
    "importlib.import_module": {"_target_": "importlib.import_module", "name": "antigravity"},
    "numpy.f2py": {"_target_": "numpy.testing.runstring", "astr": "import os; os.mkdir('MARK')", "dict": {}},
    "logging.FileHandler": {"_target_": "logging.FileHandler", "filename": "MARK"},
    "hydra.utils.call": {"_target_": "hydra.utils.call", "config": {"_target_": "os.mkdir", "path": "MARK"}},
    "hydra.utils.instantiate": {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.mkdir", "path": "MARK"}},
    "hydra.utils.get_method": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"},
    "functools.partial": {"_target_": "functools.partial", "_args_": ["os.mkdir", "MARK"]},
    "through a module of mmft": {"_target_": "mmft.runs.directory.os.mkdir", "path": "MARK"},
    "through its imports": {"_target_": "mmft.runs.environment.subprocess.run", "args": ["mkdir", "MARK"]},
    "through its builtins": {"_target_": "mmft.config.compose.__builtins__.open", "file": "MARK", "mode": "w"},
    "mmft's own remover": {"_target_": "mmft.data.prepare._remove", "folder": "KEPT"},
    "mmft's own file opener": {"_target_": "mmft.data.writer.Report", "path": "MARK"},
    "mmft's own database": {"_target_": "mmft.data.image_index.ImageIndex", "path": "MARK"},
    "mmft's own run": {"_target_": "mmft.runs.directory.Run.create", "output_dir": "MARK", "words": []},
    "mmft's own command": {"_target_": "mmft.__main__.main", "argv": ["prepare", "output_dir=MARK"]},
    "mmft's own upload": {"_target_": "mmft.export.publish.push", "folder": "KEPT", "repo": "a/b", "hub": "huggingface", "private": False},
    "another section's kind": {"_target_": "mmft.verbs.prepare.Prepare"},
    "partial": {"_target_": "os.mkdir", "path": "MARK", "_partial_": True},
    "not a name": {"_target_": "os.mkdir('MARK')"},
    "a list": {"_target_": ["os.mkdir"], "path": "MARK"},
    "an interpolation": {"_target_": "${name}", "path": "MARK"},
    "nested": {"_target_": "mmft.loggers.multi.Multi", "loggers": {"a": {"_target_": "os.mkdir", "path": "MARK"}}},
}


def filled(node, tmp_path):
    for word in ("MARK", "KEPT", "SCRIPT"):
        node = json.loads(json.dumps(node).replace(word, (tmp_path / word.lower()).as_posix()))
    return node


@pytest.fixture
def trap(tmp_path):
    """Call it at the end: nothing was made and nothing removed."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "script").write_text(f"import os; os.mkdir({(tmp_path / 'mark').as_posix()!r})")

    def untouched():
        assert not (tmp_path / "mark").exists() and (tmp_path / "kept" / "file").exists()
        return True

    return untouched


SECTIONS = ("logger", "data", "model", "collator")
EACH_ONCE = [(payload, SECTIONS[i % 4]) for i, payload in enumerate(PAYLOADS)]
EVERYWHERE = [pytest.param(p, s, marks=pytest.mark.long) for p in PAYLOADS for s in SECTIONS if (p, s) not in EACH_ONCE]


@pytest.mark.parametrize(("payload", "section"), EACH_ONCE + EVERYWHERE)
def test_a_payload_in_a_config_has_no_effect(mmft, trap, tmp_path, payload, section):
    (tmp_path / "dir" / section).mkdir(parents=True)
    (tmp_path / "dir" / section / "evil.yaml").write_text(yaml.safe_dump(filled(PAYLOADS[payload], tmp_path)), encoding="utf-8")
    code, _, err = mmft("prepare", "--config-dir", str(tmp_path / "dir"), f"{section}=evil", "name=os.mkdir")
    assert code == 2 and err.count("\n") == 1 and err.startswith("mmft: "), err
    assert trap() and not (tmp_path / "outputs").exists()


@pytest.mark.long
def test_a_payload_in_a_snapshot_has_no_effect(mmft, trap, tmp_path):
    whole = to_plain(compose.compose(["logger=none"]))
    for section in ("logger", "data", "model", "collator", "task"):
        for payload in PAYLOADS.values():
            if section == "task" and payload["_target_"] == "mmft.verbs.prepare.Prepare":
                continue  # a task as any other
            text = yaml.safe_dump({**whole, section: filled(payload, tmp_path)})
            (tmp_path / "snapshot.yaml").write_text(text, encoding="utf-8")
            code, _, err = mmft("--config-dir", str(tmp_path), "--config-name", "snapshot", "name=os.mkdir")
            assert code == 2 and err.count("\n") == 1 and trap(), (section, payload, err)


# --- Hydra's own section ------------------------------------------------------------------------------------------

CALL = {"_target_": "os.mkdir", "path": "MARK"}
HYDRA = {
    "callbacks in the config": ("evil.yaml", {"defaults": ["config", "_self_"], "hydra": {"callbacks": {"x": CALL}}}, ""),
    "callbacks in a preset": ("experiment/evil.yaml", {"hydra": {"callbacks": {"x": CALL}}}, "# @package _global_\n"),
    "a file placed in Hydra's section": ("experiment/evil.yaml", {"x": CALL}, "# @package hydra.callbacks\n"),
    "placed by the defaults list": ("experiment/evil.yaml", {"defaults": [{"/data@hydra.callbacks.x": "call"}]}, "# @package _global_\n"),
    "a launcher": ("experiment/evil.yaml", {"hydra": {"launcher": CALL}}, "# @package _global_\n"),
    "a launcher by name": ("experiment/evil.yaml", {"defaults": [{"override /hydra/launcher": "evil"}]}, "# @package _global_\n"),
    "a sweeper": ("experiment/evil.yaml", {"hydra": {"sweeper": CALL}}, "# @package _global_\n"),
    "logging": ("experiment/evil.yaml", {"hydra": {"job_logging": {"version": 1, "handlers": {"x": {"()": "os.mkdir", "path": "MARK"}}}}}, "# @package _global_\n"),
    "another search path": ("evil.yaml", {"defaults": ["config", "_self_"], "hydra": {"searchpath": ["file://MARK"]}}, ""),
    "environment variables": ("experiment/evil.yaml", {"hydra": {"job": {"env_set": {"PYTHONSTARTUP": "SCRIPT"}}}}, "# @package _global_\n"),
    "mmft's Hydra settings replaced": ("hydra/mmft.yaml", {"callbacks": {"x": CALL}}, ""),
    "logging replaced": ("hydra/job_logging/none.yaml", {"version": 1, "handlers": {"x": {"()": "os.mkdir", "path": "MARK"}}}, ""),
    "the basic launcher replaced": ("hydra/launcher/basic.yaml", CALL, ""),
    "a shipped launcher replaced": ("hydra/launcher/joblib.yaml", CALL, ""),
}


@pytest.mark.parametrize("words", [["-m"], pytest.param([], marks=pytest.mark.long), pytest.param(["--cfg", "job"], marks=pytest.mark.long)], ids=" ".join)
@pytest.mark.parametrize("name", HYDRA)
def test_a_file_cannot_have_hydra_call_anything(mmft, trap, tmp_path, name, words):
    place, content, head = HYDRA[name]
    folder = tmp_path / "dir"
    for path, text in (("hydra/launcher/evil.yaml", CALL), ("data/call.yaml", CALL), (place, content)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text((head if path == place else "") + yaml.safe_dump(filled(text, tmp_path)), encoding="utf-8")
    chosen = ["--config-name", "evil"] if place == "evil.yaml" else ["experiment=evil"] if place.startswith("experiment") else []
    code, _, err = mmft("prepare", *words, "--config-dir", str(folder), *chosen)
    assert code == 2 and err.count("\n") == 1 and "could start other programs" in err, err
    assert trap()


@pytest.mark.parametrize("word", [
    "+hydra.callbacks.x._target_=os.mkdir", "hydra.launcher._target_=os.mkdir", "hydra.sweeper._target_=subprocess.run",
    "+hydra.callbacks.x._target_=hydra.utils.call", "+hydra.callbacks.x._target_=mmft.__main__.main", "+hydra.job_logging.handlers.x.class=os.mkdir",
    "hydra.launcher._target_=hydra_plugins.hydra_joblib_launcher._core.os.mkdir.x",
])  # fmt: skip
@pytest.mark.parametrize("flag", ["-m", "--info=config"])
def test_nor_can_a_word_of_the_command(mmft, trap, word, flag):
    code, _, err = mmft("prepare", flag, word)
    assert code == 2 and "is refused" in err and err.count("\n") == 1 and trap(), err


def test_a_users_own_launcher_and_search_preset_still_work(mmft, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /hydra/sweeper: optuna]\nhydra: {sweeper: {n_trials: 3}}\nlora: {r: 2}\n", encoding="utf-8")
    (tmp_path / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "hydra" / "launcher" / "mine.yaml").write_text("_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n", encoding="utf-8")
    composed = compose.compose_hydra(["experiment=mine", "hydra/launcher=mine"], str(tmp_path))
    assert composed.hydra.sweeper.n_trials == 3 and composed.lora.r == 2


# --- interpolations and secrets -----------------------------------------------------------------------------------

SECRET = "planted0123456789abcdef"


@pytest.mark.parametrize("text", ["${oc.env:HF_TOKEN}", "${oc.env:HF_TOKEN,none}", "${oc.decode:${oc.env:HF_TOKEN}}", "x${oc.env:AWS_SECRET_ACCESS_KEY}",
                                  "${oc.env:${task.word}}", "${oc.env:DATABASE_URL}"])  # fmt: skip
def test_an_interpolation_reads_no_secret(mmft, tmp_path, monkeypatch, text):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL"):
        monkeypatch.setenv(name, SECRET)
    (tmp_path / "experiment").mkdir()
    value = text.replace("${task.word}", "${name}")
    (tmp_path / "experiment" / "evil.yaml").write_text(f"# @package _global_\ndata: {{prompt: '{value}'}}\nname: HF_TOKEN\n", encoding="utf-8")
    for words in (["prepare"], ["--cfg", "job", "--resolve"]):
        code, out, err = mmft(*words, "--config-dir", str(tmp_path), "data=table", "data.path=x.csv", "experiment=evil")
        assert code != 0 and SECRET not in out + err and "may not read the environment variable" in err, err


def test_an_interpolation_reads_places_and_what_the_user_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("MY_FOLDER", "/mine")
    monkeypatch.setenv("MMFT_ENV", "OTHER MY_FOLDER")
    assert compose.compose(["name=${oc.env:SCRATCH}"]).name == "/scratch/me"
    assert compose.compose(["name=${oc.env:MY_FOLDER}"]).name == "/mine"


@pytest.mark.parametrize("words", [
    [f"trainer.hub_token={SECRET}"], [f"name={SECRET}"], [f"output_dir=/tmp/{SECRET}/x"], ["data=table", f"data.path=https://me:{SECRET}2@host/x.csv"],
    [f"+logger.api_key={SECRET}"], [f"trainer.hub_tokn={SECRET}"], [f"{SECRET}"], [f"--{SECRET}"], [f"name=[{SECRET}"], [f"lora.r={SECRET}"],
    [f"model.processor.token={SECRET}"],
])  # fmt: skip
def test_a_secret_in_a_command_is_refused_and_not_repeated(mmft, tmp_path, monkeypatch, words):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    code, out, err = mmft("--cfg", "job", *words, output_dir=False)
    assert code == 2 and err.count("\n") == 1 and SECRET not in out + err, err


def test_words_that_only_look_like_secrets_pass():
    secrets.check({"generation": {"pad_token_id": 3, "max_new_tokens": 4}, "trainer": {"hub_token": None}, "image_token": "x",
                   "name": "https://host:80/a@b", "key": "turns_key", "path": "me@host:x"})  # fmt: skip


@pytest.mark.long
def test_planted_secrets_are_in_no_file_and_no_line_of_a_run(tmp_path):
    planted = {name: f"planted{i}0123456789abcdef" for i, name in enumerate(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SWANLAB_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MODELSCOPE_API_TOKEN"))}  # fmt: skip
    words = ["experiment=debug", "logger=both", "data.pictures=40", "data.splits.validation=4", "trainer.save_strategy=steps", "trainer.save_steps=1",
             "generation.max_new_tokens=2", f"run_dir={tmp_path / 'run'}", f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "mmft", *words], capture_output=True, env={**os.environ, **planted, "SWANLAB_MODE": "offline"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20 and any("swanlog" in p.as_posix() or "swanlab" in p.as_posix() for p in files)
    found = [p.name for p in files for value in planted.values() if value.encode() in p.read_bytes()]
    assert not found and not any(v.encode() in done.stdout + done.stderr for v in planted.values())
    adapter = [p.suffix for p in (tmp_path / "run" / "adapter").iterdir()]
    assert ".safetensors" in adapter and not {".bin", ".pt", ".pkl", ".pth"} & set(adapter)


# --- models of strangers ------------------------------------------------------------------------------------------


@pytest.fixture
def strange(small, tmp_path):
    """A model folder whose config names classes of its own, and a pickle beside its weights; both leave a mark."""
    import torch

    folder = Path(shutil.copytree(small("qwen2vl"), tmp_path / "strange"))
    mark = (tmp_path / "mark").as_posix()
    (folder / "evil.py").write_text(
        f"import os\nos.makedirs({mark!r}, exist_ok=True)\n"
        "from transformers import Qwen2VLConfig as Config, Qwen2VLProcessor as Processor\n", encoding="utf-8")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoProcessor": "evil.Processor"}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")

    class Evil:
        def __reduce__(self):
            return os.makedirs, (mark,)

    torch.save(Evil(), folder / "pytorch_model.bin")
    return folder


TINY_RUN = ["model=qwen2vl", "model.processor={}", "data.pictures=12", "data.splits.validation=0", "evaluation.split=null", "logger=none",
            "trainer.max_steps=1", "trainer.per_device_train_batch_size=1", "audit=false"]  # fmt: skip


def test_a_models_own_code_runs_only_when_the_command_says_so(mmft, strange, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MMFT_TRUST_REMOTE_CODE", "")
    code, _, err = mmft(*TINY_RUN, f"model.path={strange}")
    assert code == 0 and not (tmp_path / "mark").exists(), err  # transformers' own class does


@pytest.mark.long
def test_the_flag_lets_it_run_and_is_recorded(strange, tmp_path):
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    words = [*TINY_RUN, f"model.path={strange}", f"run_dir={tmp_path / 'run'}", f"output_dir={tmp_path / 'out'}", "--trust-remote-code"]
    done = subprocess.run([sys.executable, "-m", "mmft", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "mark").exists() and "--trust-remote-code" in json.loads((tmp_path / "run" / "env.json").read_text(encoding="utf-8"))["notes"][0]
    assert "trust_remote_code" not in (tmp_path / "run" / "snapshot.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["experiment", "model.processor", "command"])
def test_trust_remote_code_is_no_key_of_a_config(mmft, strange, tmp_path, file):
    (tmp_path / "dir" / "experiment").mkdir(parents=True)
    text = {"experiment": "model: {trust_remote_code: true}", "model.processor": "model: {processor: {trust_remote_code: true}}", "command": "{}"}[file]
    (tmp_path / "dir" / "experiment" / "evil.yaml").write_text("# @package _global_\n" + text + "\n", encoding="utf-8")
    own = ["model.trust_remote_code=true"] if file == "command" else []
    code, _, err = mmft(*TINY_RUN, f"model.path={strange}", "--config-dir", str(tmp_path / "dir"), "experiment=evil", *own)
    assert code == 2 and "--trust-remote-code" in err and err.count("\n") == 1 and not (tmp_path / "mark").exists(), err


@pytest.mark.parametrize("word, expected", [
    ("lora.megatron_core=evil", "lora.megatron_core"), ("lora.megatron_config={a: 1}", "lora.megatron_config"),
    ("model.attn_implementation=someone/kernel", "model.attn_implementation"), ("model.processor.cache_dir=x", "model.processor.cache_dir"),
])  # fmt: skip
def test_keys_that_load_code_are_refused(mmft, word, expected):
    code, _, err = mmft("--cfg", "job", word, output_dir=False)
    assert code == 2 and expected in err and err.count("\n") == 1, err


# --- the source itself --------------------------------------------------------------------------------------------

FORBIDDEN = re.compile(r"^(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\.(loads?|open|Unpickler)$|^(eval|exec|os\.system|os\.popen|yaml\.load|yaml\.unsafe_load)$"
                       r"|\.extractall$|^(tarfile|zipfile)\.")  # fmt: skip


def test_mmft_unpickles_nothing_and_unpacks_no_archive():
    """torch.load only with weights_only=True; no pickle, eval, shell anywhere in the package; archives are read in two modules, and never unpacked."""
    wrong, files = [], 0
    for file in sorted((ROOT / "mmft").rglob("*.py")):
        files += 1
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keys = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = name in ("torch.load", "load_checkpoint") and keys.get("weights_only") != "True"
            if file.name in ("archives.py", "webdataset.py") and name in ("zipfile.ZipFile", "tarfile.open"):
                continue
            if FORBIDDEN.search(name) or unsafe or keys.get("shell") == "True" or keys.get("allow_pickle") == "True" or keys.get("trust_remote_code") == "True":
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {name}")
    assert files > 80 and not wrong


def test_the_source_test_would_find_them():
    assert all(FORBIDDEN.search(n) for n in ("pickle.load", "eval", "os.system", "archive.extractall", "tarfile.open")) and not FORBIDDEN.search("json.loads")


def test_a_refused_target_is_a_users_error():
    with pytest.raises(UserError, match="refused"):
        resolve("mmft.data.prepare._remove", "data")
