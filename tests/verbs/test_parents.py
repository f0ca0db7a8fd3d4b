"""Runs that build on others: lora.start, model.adapters and a longer training, against plain peft, hand-made sums and uninterrupted runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from interrupted import killed_after
from safetensors.torch import load_file, save_file
from verb_data import draw

ASSETS = Path(__file__).resolve().parents[2] / "mmft" / "assets" / "tiny"
SMALL = ["lora.r=2", "lora.lora_alpha=4", "evaluation.split=null", "trainer.logging_steps=1", "trainer.warmup_steps=0", "logger=none", "audit=false"]
SGD = ["trainer.optim=sgd", "trainer.lr_scheduler_type=constant", "trainer.learning_rate=0.5"]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


class Home:
    """outputs: where runs are written. train(name, *words): a run of 4 rows a step on 12 drawn pictures, by the command line."""

    def __init__(self, folder: Path):
        self.outputs = folder / "outputs"
        draw(folder / "pictures", 13)
        self.data = ["data=table", f"data.path={(folder / 'pictures' / 'rows.csv').as_posix()}", "data.columns.prompt=prompt", "data.splits.validation=1"]
        self.common = [*SMALL, *self.data, "trainer.per_device_train_batch_size=4"]

    def __truediv__(self, name: str) -> Path:
        return self.outputs / name

    def words(self, name: str, *words: str) -> list[str]:
        return [*self.common, *words, f"output_dir={self.outputs.as_posix()}", f"run_dir={(self.outputs / name).as_posix()}"]

    def train(self, name: str, *words: str) -> Path:
        from mmft.cli.main import main

        assert main(self.words(name, *words)) == 0
        return self.outputs / name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = Home(tmp_path_factory.mktemp("parents"))
    made.train("first", *SGD, "trainer.max_steps=2")
    return made


@pytest.fixture
def ask(mmft, home):
    """A command in the home's outputs: (exit code, stdout, stderr)."""
    return lambda *words: mmft(*words, f"output_dir={home.outputs.as_posix()}", output_dir=False)


@pytest.fixture
def refused(ask, home):
    """The one line that refuses a training."""

    def message(*words: str) -> str:
        code, out, err = ask(*home.common, *words)
        assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, (out, err)
        return err

    return message


# --- the same adapter goes on ------------------------------------------------------------------------------------------


def test_a_start_has_every_weight_of_the_parent_and_is_recorded(home):
    child = home.train("unmoved", *SGD, "trainer.learning_rate=0", "trainer.max_steps=1", "lora.start=first", "seed=7")
    assert weights(child) == weights(home / "first")
    [parent] = read(child / "env.json")["parents"]
    assert (parent["role"], parent["run"], parent["steps"]) == ("start", "first", 2) and len(parent["sha256"]) == 64
    assert yaml.safe_load((child / "snapshot.yaml").read_text())["lora"]["start"] == (home / "first").as_posix(), "a short name is written out"
    assert "first" in (child / "report.md").read_text(encoding="utf-8").split("Builds on")[1]
    assert "first" in (child / "report.html").read_text(encoding="utf-8").split("Builds on")[1]
    assert "`first`: its adapter went on in `unmoved`, 2 steps" in (child / "adapter" / "README.md").read_text(encoding="utf-8")


def test_two_and_two_steps_from_a_folder_are_four(home):
    """One training row, so that the order of the rows is the same in both; no dropout, whose masks belong to a step."""
    one = [*SGD, "data.limit=2", "trainer.per_device_train_batch_size=1", "lora.lora_dropout=0"]
    half = home.train("half", *one, "trainer.max_steps=2")
    home.train("whole", *one, "trainer.max_steps=4")
    child = home.train("other_half", *one, "trainer.max_steps=2", f"lora.start={(half / 'adapter').as_posix()}")
    assert weights(child) == weights(home / "whole") and weights(child) != weights(half)
    assert [value for _, value in losses(half) + losses(child)] == [value for _, value in losses(home / "whole")]


def test_starts_train_jointly_as_they_do_alone(home, ask):
    words = [*SGD[:2], "trainer.max_steps=1", "lora.start=first"]
    code, out, err = ask("-m", *home.common, *words, "trainer.learning_rate=0.5,0.1", "name=both", "hydra.launcher.processes=1")
    assert code == 0 and "2 points in step" in out, err
    alone = home.train("alone", *words, "trainer.learning_rate=0.1")
    joint = adapter(home / "sweeps" / "both" / "trainer.learning_rate-0.1")
    assert all(torch.allclose(value, adapter(alone)[name], rtol=1e-4, atol=1e-6) for name, value in joint.items())


def test_adapters_over_a_merged_one_train_jointly_as_they_do_alone(home, ask):
    words = [*SGD, "trainer.max_steps=1", "model.adapters=[first]", "seed=3"]
    code, out, err = ask("-m", *home.common[2:], *words, "lora.r=2,4", "name=over_first", "hydra.launcher.processes=1")
    assert code == 0 and "2 points in step" in out, err
    alone = home.train("over_alone", *words, "lora.lora_alpha=32")
    joint = adapter(home / "sweeps" / "over_first" / "lora.r-2")
    assert all(torch.allclose(value, adapter(alone)[name], rtol=1e-4, atol=1e-5) for name, value in joint.items())
    assert [p["run"] for p in read(home / "sweeps" / "over_first" / "lora.r-4" / "env.json")["parents"]] == ["first"]


REFUSED = [
    (["lora.start=first", "lora.r=4"], "lora.r=2"),
    (["lora.start=first", "lora.lora_alpha=8"], "lora.lora_alpha=4"),
    (["lora.start=first", "lora.use_rslora=true"], "lora.use_rslora=false"),
    (["lora.start=first", "lora.target_modules=[q_proj]"], "is in the adapter and not the plan"),
    (["lora.start=first", "lora.scope=all"], "is in the plan and not the adapter"),
    (["lora.start=first", "lora.init_lora_weights=pissa"], "makes a new adapter"),
    (["lora.start=frist"], "lora.start=frist: no such directory"),
    (["lora.start=first", "model.adapters=[first]"], "leave out model.adapters"),
    (["model.adapters=[first]", "model.quantization.load_in_8bit=true"], "model.adapters"),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED)
def test_an_adapter_that_is_not_this_one_is_refused(refused, words, expected):
    message = refused(*words)
    assert expected in message and ("lora.start=" in message or "model.adapters" in message), message


def test_an_adapter_of_another_base_is_refused(refused, home, tmp_path):
    base = Path(shutil.copytree(ASSETS, tmp_path / "other"))
    state = load_file(base / "model.safetensors")
    name = next(name for name, value in state.items() if value.dim() == 2)
    save_file({**state, name: state[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    assert "was trained on mmft:tiny" in refused("lora.start=first", f"model.path={base.as_posix()}")
    assert "was trained on mmft:tiny" in refused("model.adapters=[first]", f"model.path={base.as_posix()}")
    bare = Path(shutil.copytree(home / "first" / "adapter", tmp_path / "bare"))  # nothing but its own config says what it was made for
    assert f"was made for {ASSETS}" in refused(f"lora.start={bare.as_posix()}", f"model.path={base.as_posix()}")


def test_what_is_no_adapter_is_refused(refused, home, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "neither a run nor a folder with an adapter" in refused(f"lora.start={(tmp_path / 'empty').as_posix()}")
    torn = Path(shutil.copytree(home / "first" / "adapter", tmp_path / "torn"))
    (torn / "adapter_model.safetensors").write_bytes(b"torn")
    assert "the adapter cannot be read" in refused(f"lora.start={torn.as_posix()}")
    other = Path(shutil.copytree(home / "first" / "adapter", tmp_path / "loha"))
    (other / "adapter_config.json").write_text(json.dumps({**read(other / "adapter_config.json"), "peft_type": "LOHA"}))
    assert "an adapter of the type LOHA" in refused(f"lora.start={other.as_posix()}")


# --- merged below a new one ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def over(home):
    """A run over the merged adapter of `first`, measured on its held-out row."""
    return home.train("over", *SGD, "trainer.max_steps=2", "model.adapters=[first]", "evaluation.split=validation", "generation.max_new_tokens=4")


def test_a_chain_computes_what_plain_peft_computes(over, home, mmft):
    """The logits of the run as mmft opens it, against base, merged first adapter and second adapter by peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from mmft.config.compose import compose
    from mmft.data.prepare import prepared_data
    from mmft.runs.open import open_run

    cfg = compose([f"output_dir={home.outputs.as_posix()}"])
    opened = open_run(over, cfg, [])
    batch = opened.collator(list(prepared_data(opened.cfg).split("train"))[:2])
    batch.pop("row_ids"), batch.pop("labels")
    plain = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32)
    before = plain(**batch).logits
    plain = PeftModel.from_pretrained(plain, home / "first" / "adapter").merge_and_unload()
    plain = PeftModel.from_pretrained(plain, over / "adapter").eval()
    with torch.no_grad():
        expected, got = plain(**batch).logits, opened.model(**batch).logits
        with opened.base() as base:
            below = base(**batch).logits
    shown = batch["attention_mask"].bool()
    assert torch.allclose(got[shown], expected[shown], atol=1e-4)
    assert (below - before)[shown].abs().max() > 1e-2, "its base is not the bare one"
    assert read(over / "summary.json")["base_eval_loss"] == pytest.approx(float(_loss(home, "first")), rel=1e-4)


def _loss(home: Home, name: str) -> float:
    """The held-out loss of a run, by mmft evaluate."""
    from mmft.cli.main import main

    words = [f"run={(home / name).as_posix()}", "evaluation.split=validation", "generation.max_new_tokens=4", f"output_dir={home.outputs.as_posix()}"]
    assert main(["evaluate", *words]) == 0
    return read(next((home / name / "eval").glob("*.json")))["eval_loss"]


def test_what_an_adapter_sits_on_is_written_beside_it(over, home):
    config, chain = read(over / "adapter" / "adapter_config.json"), read(over / "adapter" / "base_chain.json")
    assert config["base_model_name_or_path"] == f"{ASSETS} with {(home / 'first').as_posix()} merged into it" and config["revision"] is None
    [below] = chain["below"]
    assert below["run"] == "first" and chain["base"]["path"] == "mmft:tiny" and below == read(over / "env.json")["parents"][0]
    assert "merge_and_unload()" in (over / "adapter" / "README.md").read_text(encoding="utf-8")
    assert not (home / "first" / "adapter" / "base_chain.json").exists()


def test_merging_a_chain_adds_both_adapters(over, home, ask, tmp_path):
    """W + s B1 A1 + s B2 A2 by hand, in double precision, of every adapted layer."""
    code, out, err = ask("merge", f"run={over.as_posix()}", f"out={(tmp_path / 'merged').as_posix()}", "samples=1")
    assert code == 0, err
    merged, base = load_file(tmp_path / "merged" / "model.safetensors"), load_file(ASSETS / "model.safetensors")
    first, second = adapter(home / "first"), adapter(over)
    checked = 0
    for key in (k for k in first if ".lora_A." in k):
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        [stored] = [k for k in base if name.endswith(k) or k.endswith(name.removeprefix("model."))][:1]
        wanted = base[stored].double()
        for own in (first, second):
            wanted = wanted + 2.0 * own[key.replace("lora_A", "lora_B")].double() @ own[key].double()
        assert torch.allclose(merged[stored].double(), wanted, atol=1e-5), name
        checked += 1
    assert checked > 4
    assert [p["run"] for p in read(tmp_path / "merged" / "merge.json")["parents"]] == ["first"]


def test_a_chain_of_three_brings_what_it_sits_on(over, home, refused, tmp_path):
    third = home.train("third", *SGD, "trainer.max_steps=1", "model.adapters=[over]")
    assert [(p["role"], p["run"]) for p in read(third / "env.json")["parents"]] == [("below", "first"), ("below", "over")]
    again = home.train("again", *SGD, "trainer.learning_rate=0", "trainer.max_steps=1", "model.adapters=[first]", "lora.start=over")
    assert weights(again) == weights(over)
    assert f"model.adapters=[{(home / 'first').as_posix()}]" in refused("lora.start=over")
    other = Path(shutil.copytree(home / "first" / "adapter", tmp_path / "other"))
    state = load_file(other / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, other / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "stand side by side" in refused(f"model.adapters=[{other.as_posix()},over]")
    text = (third / "report.md").read_text(encoding="utf-8").split("Builds on")[1]
    assert text.index("first") < text.index("over")


def test_a_parent_that_changed_or_is_gone_is_named_and_a_moved_one_found(over, home, ask, tmp_path):
    moved = Path(shutil.copytree(home.outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("data", "cache", "sweeps")))
    run, parent = moved / "over", moved / "first"
    text = (run / "snapshot.yaml").read_text()
    (run / "snapshot.yaml").write_text(text.replace((home / "first").as_posix(), (tmp_path / "gone" / "first").as_posix()))
    words = ["predict", f"run={run.as_posix()}", f"input={(home.outputs.parent / 'pictures' / '0.png').as_posix()}", "prompt=What is this?", "generation.max_new_tokens=2"]
    assert ask(*words)[0] == 0, "the parent lies beside the run, as it did"
    parent.rename(moved / "elsewhere")
    code, _, err = ask(*words)
    assert code == 2 and err.count("\n") == 1 and "gone/first" in err and "is missing" in err and "model.adapters=[...]" in err
    assert ask(*words, f"model.adapters=[{(moved / 'elsewhere').as_posix()}]")[0] == 0
    state = adapter(moved / "elsewhere")
    state[min(state)] += 1
    save_file(state, moved / "elsewhere" / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    code, _, err = ask(*words, f"model.adapters=[{(moved / 'elsewhere').as_posix()}]")
    assert code == 2 and err.count("\n") == 1 and "elsewhere" in err and "have changed since" in err


def test_a_stopped_run_goes_on_when_its_parent_was_moved(home, ask, tmp_path):
    saved = [*SGD, "trainer.max_steps=3", "trainer.save_strategy=steps", "trainer.save_steps=1", "lora.start=first"]
    whole = home.train("stops", *saved)
    stopped = killed_after(whole, 2, tmp_path / "stopped")
    text = (stopped / "snapshot.yaml").read_text()
    (stopped / "snapshot.yaml").write_text(text.replace((home / "first").as_posix(), (tmp_path / "gone").as_posix()))
    code, _, err = ask("resume", f"run={stopped.as_posix()}")
    assert code == 2 and "lora.start=" in err and "gone" in err and err.count("\n") == 1
    code, _, err = ask("resume", f"run={stopped.as_posix()}", "lora.start=unmoved_other")
    assert code == 2 and "lora.start=unmoved_other" in err
    other = Path(shutil.copytree(home / "first" / "adapter", tmp_path / "other"))
    save_file({name: value + 1 for name, value in adapter(home / "first").items()}, other / "adapter_model.safetensors", metadata={"format": "pt"})
    code, _, err = ask("resume", f"run={stopped.as_posix()}", f"lora.start={other.as_posix()}")
    assert code == 2 and "have changed since" in err and err.count("\n") == 1
    code, out, err = ask("resume", f"run={stopped.as_posix()}", "lora.start=first")
    assert code == 0 and "from step 2" in out and weights(stopped) == weights(whole), err


def test_reproducing_follows_the_chain(over, home, ask, tmp_path):
    code, out, err = ask("reproduce", f"run={over.as_posix()}", f"run_dir={(tmp_path / 'second').as_posix()}")
    assert code == 0 and "identical to the bit" in out, err
    assert read(tmp_path / "second" / "env.json")["parents"] == read(over / "env.json")["parents"]


# --- more steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(home):
    """Four steps at once, what `first` becomes with two more. Saving checkpoints changes no weight, so it stands for runs that save, too."""
    return home.train("four", *SGD, "trainer.max_steps=4")


@pytest.mark.parametrize("kept", [True, False])
def test_two_steps_and_two_more_are_four(home, ask, four, kept):
    """With dropout, over the border of an epoch, and the saved optimizer state or none, which SGD does not need."""
    parent = home.train("kept", *SGD, "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.max_steps=2") if kept else home / "first"
    before = {p: p.read_bytes() for p in parent.rglob("*") if p.is_file()}
    code, out, err = ask("resume", f"run={parent.as_posix()}", "trainer.max_steps=4", f"run_dir={(home / f'{parent.name}_child').as_posix()}")
    assert code == 0 and "constant over all 4 steps, so step 3 has the rate 0.5" in out, err
    child = home / f"{parent.name}_child"
    assert weights(child) == weights(four) and losses(child) == losses(four)
    assert {p: p.read_bytes() for p in parent.rglob("*") if p.is_file()} == before, "the parent stays as it was"
    ours, theirs = read(child / "summary.json"), read(four / "summary.json")
    assert [ours[k] == theirs[k] for k in ("steps", "supervised_tokens", "train_loss")] == [True] * 3
    [record] = read(child / "env.json")["parents"]
    assert (record["role"], record["run"], record["steps"]) == ("extended", parent.name, 2)


def test_adam_goes_on_with_its_moments_and_a_cosine_with_the_longer_schedule(home, ask):
    adam = ["trainer.learning_rate=0.01", "trainer.save_strategy=epoch", "trainer.num_train_epochs=1"]
    parent = home.train("epoch", *adam)
    code, out, err = ask("resume", f"run={parent.as_posix()}", "trainer.num_train_epochs=2", f"run_dir={(home / 'epochs').as_posix()}")
    assert code == 0, err
    rates = [json.loads(line).get("learning_rate") for line in (home / "epochs" / "metrics.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate is not None]
    expected = [0.01 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)] + [0.01 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(3, 6)]
    assert rates == pytest.approx(expected, rel=1e-6)
    state = torch.load(home / "epochs" / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {int(moments["step"]) for moments in state["state"].values()} == {6}, "the moments have seen all six steps"
    code, out, err = ask("reproduce", f"run={(home / 'epochs').as_posix()}", f"run_dir={(home / 'epochs_again').as_posix()}")
    assert code == 0 and "identical to the bit" in out, err


def test_a_run_is_extended_by_its_length_alone(home, ask):
    first = f"run={(home / 'first').as_posix()}"
    for word, expected in {"trainer.max_steps=2": "give a larger number", "lora.r=4": "lora.start=", "trainer.learning_rate=0.1": "lora.start="}.items():
        code, _, err = ask("resume", first, word)
        assert code == 2 and err.count("\n") == 1 and word in err and expected in err, err
    code, out, _ = ask("resume", first)
    assert code == 0 and "is finished already" in out


def test_a_changed_parent_cannot_be_reproduced_from(home, ask, tmp_path):
    copy = Path(shutil.copytree(home / "unmoved", tmp_path / "child"))
    env = read(copy / "env.json")
    env["parents"][0]["sha256"] = "0" * 64
    (copy / "env.json").write_text(json.dumps(env))
    code, _, err = ask("reproduce", f"run={copy.as_posix()}", f"run_dir={(tmp_path / 'second').as_posix()}")
    assert code == 2 and err.count("\n") == 1 and (home / "first").as_posix() in err and "have changed since" in err


def test_the_leaderboard_names_what_runs_build_on(home, ask):
    code, out, err = ask("report", f"run={home.outputs.as_posix()}")
    assert code == 0, err
    page = (home.outputs / "report.md").read_text(encoding="utf-8")
    assert "unmoved builds on first (its adapter went on)" in page.replace("\\", "") and "its adapter had 2 steps before" in page.replace("\\", "")


HUB_TRAINING = """
import sys
from mmft.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_an_adapter_comes_from_a_hub(home, tmp_path):
    """The real download code against the loopback stand-in of tests/hub.py; without a network from the cache."""
    import os
    import subprocess
    import sys

    from hub import Hub

    words = home.words("from_hub", *SGD, "trainer.learning_rate=0", "trainer.max_steps=1", "lora.start=small/first")
    with Hub() as stand_in:
        stand_in.add_folder("models", "small/first", home / "first" / "adapter")
        environment = {**os.environ, **stand_in.environment(tmp_path)}

        def run(*words: str, **more: str) -> subprocess.CompletedProcess:
            return subprocess.run([sys.executable, "-c", HUB_TRAINING, *words], capture_output=True, text=True, timeout=250, env={**environment, **more})

        done = run(*words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert weights(home / "from_hub") == weights(home / "first")
        [parent] = read(home / "from_hub" / "env.json")["parents"]
        assert (parent["role"], parent["path"], parent["run"]) == ("start", "small/first", "")
        assert not any("tokenizer" in call for call in stand_in.calls if "resolve" in call), "the adapter alone is downloaded"
        missing = run(*[w.replace("small/first", "small/frist") for w in words])
        assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "lora.start=small/frist: no such folder or run" in missing.stderr
