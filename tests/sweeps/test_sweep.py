"""Sweeps through the command line: identity of configs, finished runs, failures, a kill, two at once, the shared base."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from places import ROOT

from mmft.common.errors import UserError
from mmft.config import compose, sweep_overrides
from mmft.config.build import build
from mmft.config.identity import config_identity
from mmft.sweeps.directory import Sweep, point_name
from mmft.sweeps.points import job_of, run_point

SMALL = ["data.pictures=24", "data.splits.validation=4", "trainer.max_steps=2", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4",
         "generation.max_new_tokens=4", "evaluation.samples=0", "logger=none"]  # fmt: skip


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def board(sweep: Path) -> list[tuple]:
    """The leaderboard's figures that do not depend on the clock."""
    with (sweep / "leaderboard.csv").open(encoding="utf-8") as file:
        return [(r["run"], r["status"], r["lora.r"], r["eval_loss"], r["token_f1"], r["trainable_parameters"], r["scale"]) for r in csv.DictReader(file)]


def home(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "outputs" / "sweeps").iterdir()
    return found


# --- config_identity and names ----------------------------------------------------------------------------------------------


def test_identity_depends_on_the_content_and_not_on_names_and_folders():
    first = config_identity(compose.compose(["lora.r=4"]))
    assert first == config_identity(compose.compose(["lora.r=4", "output_dir=elsewhere", "name=x", "logger=none", "rank_by=cider", "run_dir=a/b"]))
    assert first == config_identity(compose.compose(["lora=default", "lora.r=4", "trainer.learning_rate=" + str(compose.compose([]).trainer.learning_rate)]))
    assert len({first, *(config_identity(compose.compose([w])) for w in ("lora.r=5", "seed=1", "data.pictures=9"))}) == 4


def test_the_name_of_a_point_can_be_typed_as_a_word():
    words = ["lora.r=4", "lora.target_modules=[q_proj,v_proj]", "model=tiny"]
    name = point_name(words, ["lora.r", "lora.target_modules"])
    assert name == "lora.r-4_lora.target_modules--q_proj-v_proj"
    assert len(point_name(["a=" + "x" * 400], ["a"])) <= 100
    assert compose.compose([f"run_dir={name}"]).run_dir == name


def test_points_are_every_combination_in_the_order_typed():
    points, keys = sweep_overrides.expand(["lora.r=2,4", "trainer.max_steps=3", "seed=range(1,3)"])
    assert keys == ["lora.r", "seed"]
    assert points == [[f"lora.r={r}", "trainer.max_steps=3", f"seed={s}"] for r in (2, 4) for s in (1, 2)]
    assert sweep_overrides.expand(["lora=glob(*)"])[0] == [["lora=default"], ["lora=none"]]


WAYS = {
    "values": [["lora.r=2", "trainer.learning_rate=1e-4"], ["lora.r=4", "trainer.learning_rate=1e-4"], ["lora.r=2", "trainer.learning_rate=3"]],
    "options": [["lora=default", "seed=1"], ["lora=none", "seed=1"], ["lora=none", "seed=2"], ["experiment=debug", "lora.r=2"]],
    "dictionaries": [["model.processor={max_pixels:100}", "model.processor.max_pixels=7"], ["model.processor.max_pixels=7", "model.processor={min_pixels:1}"]],
    "pluses": [["++trainer.adam_beta2=0.9", "+trainer.adam_beta1=0.8"], ["++trainer.adam_beta2=0.95", "+trainer.adam_beta1=0.8"]],
    "keys taken away": [["~lora.lora_dropout", "lora.r=2"], ["~lora.lora_dropout", "lora.r=4"]],
    "odd keys": [["++model.processor.max-pixels=7", f"model.processor={{min_pixels:{n}}}"] for n in (1, 2)],
    "references": [["lora.r=2", "lora.lora_alpha=${lora.r}"], ["lora.r=4", "lora.lora_alpha=${lora.r}"]],
    "lists": [["lora.target_modules=[q_proj]"], ["lora.target_modules=[q_proj,v_proj]"], ["lora.target_modules=null"]],
}


@pytest.mark.parametrize("points", WAYS.values(), ids=WAYS)
def test_points_composed_together_are_what_hydra_composes_for_each(points):
    alone = [compose.compose(words) for words in points]
    assert len({OmegaConf.to_yaml(cfg) for cfg in alone}) > 1
    for cfg, own in zip(sweep_overrides.compose_each(points), alone, strict=True):
        assert OmegaConf.to_yaml(cfg) == OmegaConf.to_yaml(own)
        assert OmegaConf.to_yaml(cfg, resolve=True) == OmegaConf.to_yaml(own, resolve=True)
        assert OmegaConf.is_struct(cfg)


@pytest.mark.parametrize("wrong", ["lora.rr=4", "lora.r=four", "sed=1", "+seed=1", "lora=defualt", "trainer.output_dir=x", "hydra.run.dirr=x", "seed=[", "data.hf_token=a"])
def test_a_mistake_in_one_point_is_answered_as_in_a_run_alone(wrong):
    with pytest.raises(UserError) as alone:
        compose.compose(["lora.r=2", wrong])
    with pytest.raises(UserError) as together:
        sweep_overrides.compose_each([["lora.r=2", "seed=3"], ["lora.r=2", wrong]])
    assert str(together.value) == str(alone.value)


@pytest.mark.parametrize("words, expected", [
    (["lora.r=interval(1,3)"], "hydra/sweeper=optuna"),
    (["lora.r=2,4", "run_dir=x"], "one directory a point"),
    (["lora.r=2,4", "rank_by=exactmatch"], "Did you mean exact_match?"),
    (["lora.r=2,4", "data=glob(zzz*)"], "matches no option"),
    # values that only the class of the data set knows
    (["data.pictures=32,0"], "data.pictures=0: give a whole number from 1 to 10000000"),
    (["lora.r=2,4", "data.splits.validation=4,1.5"], "data.splits.validation=1.5: give a number of rows (100) or a share below one (0.1)"),
    (["data=mix", "data.sources.a=shapes", "data.sources.b=shapes", "data.sources.b.weight=0.5,-1"], "data.sources.b.weight=-1: must be a number, 0 or above"),
    (["experiment=search", "data.pictures=choice(64,0)"], "data.pictures=0: give a whole number from 1 to 10000000"),
    (["lora.r=2,4", "data=saved", "data.path=x", "data.limit=5,0"], "data.limit=0: must be a whole number above 0"),
])  # fmt: skip
def test_a_wrong_sweep_is_one_line_and_leaves_nothing(mmft, tmp_path, words, expected):
    code, _, err = mmft("-m", *words)
    assert code == 2 and expected in err and err.count("\n") == 1 and not (tmp_path / "outputs").exists()


def test_the_presets_for_ranks_hold_the_scale(mmft):
    alphas = [compose.compose(["experiment=rank_sweep", f"lora.r={r}"]).lora.lora_alpha for r in (2, 32)]
    assert alphas == [2, 32]
    assert compose.compose(["experiment=rank_sweep_rslora"]).lora.use_rslora


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Three ranks in one process, nothing interrupted."""
    from mmft.cli.main import main

    tmp_path = tmp_path_factory.mktemp("undisturbed")
    assert main(["-m", "lora.r=2,4,8", *SMALL, f"output_dir={(tmp_path / 'outputs').as_posix()}"]) == 0
    return tmp_path


def test_the_leaderboard_is_there_and_its_page_needs_nothing_else(undisturbed):
    sweep = home(undisturbed)
    assert sorted(row[0] for row in board(sweep)) == ["lora.r-2", "lora.r-4", "lora.r-8"]
    assert {row[2]: float(row[6]) for row in board(sweep)} == {"2": 16.0, "4": 8.0, "8": 4.0}, "alpha 32 over r"
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page and page.count("data:image/svg+xml") >= 3
    assert "effective scale alpha / r" in page, "a rank sweep says that it sweeps the scale too"


def test_a_repeated_command_trains_nothing_again(mmft, undisturbed):
    sweep = home(undisturbed)
    before = {n: t for n, t in times(sweep).items() if n.startswith("lora.r-")}
    output = f"output_dir={(undisturbed / 'outputs').as_posix()}"
    code, out, err = mmft("-m", "lora.r=2,4,8", *SMALL, output, output_dir=False)
    assert code == 0 and "3 of them finished already" in out
    assert {n: t for n, t in times(sweep).items() if n.startswith("lora.r-")} == before
    plan = Sweep(sweep).points()
    assert [p.name for p in plan] == ["lora.r-2", "lora.r-4", "lora.r-8"] and len({p.identity for p in plan}) == 3


def test_one_base_is_shared_and_a_single_run_gives_the_same(mmft, tmp_path):
    """The second point uses weights that were read once, and values computed for the first; a single run reads its own.

    One after the other: jointly trained points equal single runs within rounding (tests/joint), not in every bit.
    """
    code, out, err = mmft("-m", "lora.r=2,8", "hydra/launcher=basic", *SMALL)
    assert code == 0, err
    code, _, err = mmft("lora.r=8", *SMALL, f"run_dir={(tmp_path / 'alone').as_posix()}")
    assert code == 0, err
    alone, swept = tmp_path / "alone", home(tmp_path) / "lora.r-8"
    a, b = (json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (alone, swept))
    for key in ("eval_loss", "base_eval_loss", "metrics", "base_metrics", "train_loss", "supervised_tokens", "trainable_parameters"):
        assert a[key] == b[key], key
    assert (alone / "adapter/adapter_model.safetensors").read_bytes() == (swept / "adapter/adapter_model.safetensors").read_bytes()
    assert (alone / "eval/base.jsonl").read_text(encoding="utf-8").count("\n") == 4


def test_a_base_that_a_point_changed_is_loaded_again():
    import torch

    from mmft.models.load import locate_model
    from mmft.sweeps.context import SweepContext

    family, context = build(compose.compose([]).model, "model"), SweepContext()
    located = locate_model(family)
    first = context.load(family, False, located)
    before = {k: v.clone() for k, v in first.model.state_dict().items()}
    context.end_point()
    second = context.load(family, False, located)
    assert context.base.loads == 1 and second.model is not first.model
    weight = next(second.model.parameters())
    assert weight.data_ptr() == next(first.model.parameters()).data_ptr(), "the same tensors, not copies"
    weight.data.add_(1.0)
    context.end_point()
    third = context.load(family, False, located)
    assert context.base.loads == 2 and all(torch.equal(v, before[k]) for k, v in third.model.state_dict().items())


@pytest.mark.long
def test_one_failing_point_lets_the_others_go_on(mmft, tmp_path):
    code, out, err = mmft("-m", "trainer.learning_rate=1e-4,1e30", *SMALL, "trainer.warmup_steps=0", "trainer.max_grad_norm=0")
    sweep = home(tmp_path)
    status = {p.name: Sweep(sweep).status(p) for p in Sweep(sweep).points()}
    assert code == 1 and list(status.values()) == ["finished", "failed"]
    bad = sweep / Sweep(sweep).points()[1].name
    assert err.strip().splitlines()[-1].startswith(f"mmft: failed: {bad.as_posix()}: step 2: the loss is not finite")
    assert "the loss is not finite" in (bad / "log.txt").read_text(encoding="utf-8")
    assert "failed" in (sweep / "leaderboard.csv").read_text(encoding="utf-8")
    good = times(sweep / Sweep(sweep).points()[0].name)
    assert mmft("-m", "trainer.learning_rate=1e-4,1e30", *SMALL, "trainer.warmup_steps=0", "trainer.max_grad_norm=0")[0] == 1
    assert times(sweep / Sweep(sweep).points()[0].name) == good
    assert (sweep / "earlier" / f"{bad.name}-1" / "summary.json").is_file(), "the failed try is kept aside, not written over"


def test_a_point_that_fails_early_gets_a_run_directory_too(mmft, tmp_path):
    code, _, err = mmft("-m", "lora.r=0", "seed=1,2", *SMALL)
    assert code == 1 and err.count("lora.r=0: must be a whole number above 0") >= 2
    run = home(tmp_path) / "seed-1"
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "failed" and (run / "snapshot.yaml").is_file()
    assert "must be a whole number" in (run / "log.txt").read_text(encoding="utf-8")


def test_the_config_of_a_point_is_the_one_composed_at_the_start(tmp_path):
    """Later edits of conf/ do not change it: the plan holds the resolved values, and the run uses them."""
    sweep = Sweep(tmp_path / "sweep")
    cfg = compose.compose(["lora.r=2", *SMALL, f"output_dir={(tmp_path / 'outputs').as_posix()}"])
    (point,) = sweep.add_points([(cfg, ["lora.r=2"], "lora.r-2")])
    assert point.config["trainer"]["max_steps"] == 2 and "${" not in (sweep.path / "plan.json").read_text(encoding="utf-8")
    result = run_point(job_of(sweep, point))
    assert result["status"] == "finished" and result["run"].endswith("sweep/lora.r-2") and result["objective"] > 0 and not result["reused"]
    again = run_point(job_of(sweep, point))
    assert again["reused"] and again["objective"] == result["objective"]


def test_two_configs_of_one_name_do_not_share_a_directory(tmp_path):
    sweep = Sweep(tmp_path / "sweep")
    (a,) = sweep.add_points([(compose.compose(["lora.r=2"]), ["lora.r=2"], "lora.r-2")])
    (b,) = sweep.add_points([(compose.compose(["lora.r=2", "seed=7"]), ["lora.r=2"], "lora.r-2")])
    assert a.name == "lora.r-2" and b.name == f"lora.r-2_{b.identity[:6]}" and len(sweep.points()) == 2


# --- killed, and started twice ---------------------------------------------------------------------------------------


def start(tmp_path: Path, *more: str) -> subprocess.Popen:
    words = ["-m", "lora.r=2,4,8", *SMALL, *more, f"output_dir={(tmp_path / 'outputs').as_posix()}"]
    return subprocess.Popen([sys.executable, "-m", "mmft", *words], env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("launcher", [pytest.param("basic", marks=pytest.mark.long), pytest.param("joint", marks=pytest.mark.long)])
def test_a_killed_sweep_that_is_started_again_ends_like_an_undisturbed_one(mmft, tmp_path, undisturbed, launcher):
    """One after another, the first point is finished and stays; jointly trained, none is, and all begin again."""
    process = start(tmp_path, f"hydra/launcher={launcher}")
    deadline = time.time() + 240
    while not list((tmp_path / "outputs").glob("sweeps/*/lora.r-4/env.json")):  # the second point is training
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sweep = home(tmp_path)
    states = [Sweep(sweep).status(p) for p in Sweep(sweep).points()]
    if launcher == "basic":
        assert states[0] == "finished" and states[1] in ("unfinished", "finished") and states[2] == "missing"
    done = times(sweep / "lora.r-2") if states[0] == "finished" else None
    code, out, err = mmft("-m", "lora.r=2,4,8", *SMALL)
    assert code == 0, err
    assert done is None or times(sweep / "lora.r-2") == done
    assert board(sweep) == board(home(undisturbed))
    assert (sweep / "earlier" / "lora.r-4-1").is_dir() == (states[1] == "unfinished")


def test_a_point_that_another_process_trains_is_not_trained_here(tmp_path):
    sweep = Sweep(tmp_path / "sweep")
    cfg = compose.compose(["lora.r=2", *SMALL])
    (point,) = sweep.add_points([(cfg, ["lora.r=2"], "lora.r-2")])
    with sweep.lock("lora.r-2"):
        result = run_point(job_of(sweep, point), wait=False)
    assert result["status"] == "running" and not (sweep.path / "lora.r-2").exists()


@pytest.mark.long
def test_two_sweeps_of_one_command_at_once_share_the_work(mmft, tmp_path, undisturbed):
    processes = [start(tmp_path), start(tmp_path)]
    assert [p.wait(timeout=280) for p in processes] == [0, 0]
    sweep = home(tmp_path)
    assert board(sweep) == board(home(undisturbed)) and not (sweep / "earlier").exists(), "each point was trained once"
