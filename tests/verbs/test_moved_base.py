"""A run whose base folder was moved: every verb takes model.path=NEW with the same files, and no other."""

import json
import shutil
from pathlib import Path

import pytest

SHORT = ["model=qwen2vl", "model.processor={}", "logger=none", "trainer.max_steps=2", "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=4", "trainer.per_device_train_batch_size=2",
         "trainer.learning_rate=0.01", "trainer.warmup_steps=0", "data.pictures=24", "data.splits.validation=4", "evaluation.max_samples=2",
         "evaluation.samples=0", "generation.max_new_tokens=3", "lora.r=2"]  # fmt: skip


@pytest.fixture(scope="module")
def moved(tmp_path_factory, small):
    """(run, the base's new folder, outputs) of a run whose base folder was moved after training."""
    from mmft.cli.main import main

    home = tmp_path_factory.mktemp("moved")
    old = Path(shutil.copytree(small("qwen2vl"), home / "base"))
    words = [*SHORT, f"model.path={old.as_posix()}", f"output_dir={(home / 'outputs').as_posix()}", f"run_dir={(home / 'run').as_posix()}"]
    assert main(words) == 0
    old.rename(home / "elsewhere")
    return home / "run", home / "elsewhere", home / "outputs"


@pytest.fixture
def verb(mmft, moved):
    def call(name, run, *words):
        return mmft(name, f"run={run.as_posix() if isinstance(run, Path) else run}", *words, f"output_dir={moved[2].as_posix()}", output_dir=False)

    return call


def with_other_weights(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    file = to / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return to


VERBS = {
    "evaluate": ["evaluation.split=validation"],
    "predict": ["input=validation"],
    "compare": ["index=0"],
    "merge": ["samples=1"],
    "reproduce": [],
}


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_takes_the_new_place(verb, moved, small, tmp_path, name):
    run, base, _ = moved
    words = [*VERBS[name], *([f"out={(tmp_path / 'out').as_posix()}"] if name == "merge" else []), *([f"run_dir={(tmp_path / 'new').as_posix()}"] if name == "reproduce" else [])]
    code, out, err = verb(name, run, *words)
    assert code == 2 and "no such folder" in err and err.count("\n") == 1, "the old place is empty"
    code, out, err = verb(name, run, *words, f"model.path={base.as_posix()}")
    assert code == 0, err
    if name == "reproduce":
        assert "identical to the bit" in out and "changed on purpose" not in out
    if name == "evaluate":
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        (file,) = (run / "eval").glob("*_validation_*.json")
        assert json.loads(file.read_text(encoding="utf-8"))["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-6)


def test_runs_against_each_other(verb, moved, tmp_path):
    run, base, _ = moved
    other = Path(shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("merged", "eval")))
    code, _, err = verb("compare", f"[{run.as_posix()},{other.as_posix()}]", "index=0", f"model.path={base.as_posix()}")
    assert code == 0, err


def test_the_message_says_what_to_do_and_that_works(verb, moved):
    run, base, _ = moved
    _, _, err = verb("predict", run, "input=validation")
    assert f"If the base model of run={run.as_posix()} was moved, add model.path=FOLDER." in err
    assert verb("predict", run, "input=validation", f"model.path={base.as_posix()}")[0] == 0


@pytest.mark.parametrize("name", [v for v in VERBS if v != "reproduce"])
def test_other_weights_are_refused(verb, moved, tmp_path, name):
    run, base, _ = moved
    changed = with_other_weights(base, tmp_path / "changed")
    code, _, err = verb(name, run, *VERBS[name], *([f"out={(tmp_path / 'out').as_posix()}"] if name == "merge" else []), f"model.path={changed.as_posix()}")
    assert code == 2 and "is not what it was trained on" in err and "model.path=FOLDER" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["config", "template", "extra"])
def test_any_other_file_is_refused(verb, moved, tmp_path, change):
    run, base, _ = moved
    folder = Path(shutil.copytree(base, tmp_path / "changed"))
    if change == "config":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 3}), encoding="utf-8")
    elif change == "template":
        (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    else:
        (folder / "added_tokens.json").write_text("{}", encoding="utf-8")
    code, _, err = verb("evaluate", run, f"model.path={folder.as_posix()}")
    assert code == 2 and "is not what it was trained on" in err
    (folder / "notes.md").write_text("", encoding="utf-8")


def test_files_that_no_loader_reads_do_not_count(verb, moved, tmp_path):
    run, base, _ = moved
    folder = Path(shutil.copytree(base, tmp_path / "with-notes"))
    (folder / "README.md").write_text("Mine.", encoding="utf-8")
    (folder / ".cache").mkdir()
    code, _, err = verb("predict", run, "input=validation", f"model.path={folder.as_posix()}")
    assert code == 0, err


def test_a_link_is_the_folder_it_points_to(verb, moved, tmp_path):
    run, base, _ = moved
    (tmp_path / "link").symlink_to(base, target_is_directory=True)
    assert verb("predict", run, "input=validation", f"model.path={(tmp_path / 'link').as_posix()}")[0] == 0


@pytest.mark.parametrize("word", ["model=llava", "model.dtype=bf16", "model.processor={max_pixels: 784}", "+model.path2=x", "lora.r=4", "++lora.r=4"])
def test_nothing_else_of_the_model_can_be_changed(verb, moved, word):
    code, _, err = verb("evaluate", moved[0], word, f"model.path={moved[1].as_posix()}")
    assert code == 2 and ("brings its own" in err or "no such key" in err), err


def test_a_fully_trained_run_reads_no_base(verb, moved, mmft, tmp_path):
    _, base, outputs = moved
    run = tmp_path / "full"
    words = [*SHORT[:-1], "lora=none", f"model.path={base.as_posix()}", f"run_dir={run.as_posix()}", f"output_dir={outputs.as_posix()}"]
    assert mmft(*words, output_dir=False)[0] == 0
    assert verb("predict", run, "input=validation")[0] == 0
    code, _, err = verb("predict", run, "input=validation", f"model.path={base.as_posix()}")
    assert code == 2 and "drop model.path=" in err


def test_an_interrupted_run_goes_on_with_the_moved_base(verb, moved, small, mmft, tmp_path):
    """As if killed behind its first checkpoint; the resumed run equals the uninterrupted one."""
    run, base, outputs = moved
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("merged", "DONE", "adapter", "summary.json", "checkpoint-2")))
    assert [p.name for p in (copy / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    changed = with_other_weights(base, tmp_path / "changed")
    code, _, err = verb("resume", copy, f"model.path={changed.as_posix()}")
    assert code == 2 and "is not what it was trained on" in err
    assert "changed" not in (copy / "snapshot.yaml").read_text(encoding="utf-8"), "a refused folder leaves the snapshot as it was"
    code, out, err = verb("resume", copy, f"model.path={base.as_posix()}")
    assert code == 0, err
    assert (copy / "adapter/adapter_model.safetensors").read_bytes() == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert verb("predict", copy, "input=validation")[0] == 0, "the snapshot names the new place"


def test_a_base_that_changed_while_a_run_was_stopped_is_refused(verb, moved, mmft, tmp_path):
    run, base, _ = moved
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("merged", "DONE", "adapter", "summary.json", "checkpoint-2")))
    changed = with_other_weights(base, tmp_path / "changed")
    snapshot = (copy / "snapshot.yaml").read_text(encoding="utf-8")
    old = (base.parent / "base").as_posix()
    assert old in snapshot
    (copy / "snapshot.yaml").write_text(snapshot.replace(old, changed.as_posix()), encoding="utf-8")
    code, _, err = verb("resume", copy)
    assert code == 2 and "is not what it was trained on" in err
