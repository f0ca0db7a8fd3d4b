"""Sweeps through a real Slurm, which the test starts and stops; skipped if it is not installed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
from places import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(580),
    pytest.mark.skipif(bool(slurm.missing()), reason=f"no Slurm here ({', '.join(slurm.missing())}): apt install slurm-wlm munge"),
]
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

LAUNCHER = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
POINTS = ["experiment=debug", "data.pictures=24", "data.splits.validation=4", "logger=none", "name=queued", "lora.r=4,8", "trainer.logging_steps=1"]


@pytest.fixture
def cluster(tmp_path):
    with slurm.running(tmp_path / "slurm") as environment:
        yield {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def sweep(tmp_path: Path, environment: dict[str, str], *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmft", "-m", *LAUNCHER, *POINTS, *words, f"output_dir={(tmp_path / 'outputs').as_posix()}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def queued(environment: dict[str, str], form: str) -> list[str]:
    return subprocess.run(["squeue", "--array", "--noheader", f"--format={form}"], env=environment, capture_output=True, text=True, check=True).stdout.split()


def waited(process: subprocess.Popen, ready, seconds: float = 240) -> None:
    deadline = time.time() + seconds
    while not ready():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.time() < deadline, "not reached in time"
        time.sleep(0.2)


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"loss"') if path.is_file() else 0


def test_each_point_is_a_job_and_the_leaderboard_comes_last(tmp_path, cluster):
    process = sweep(tmp_path, cluster, "trainer.max_steps=2")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-4000:]
    folder = tmp_path / "outputs" / "sweeps" / "queued"
    envs = {p.name: json.loads((p / "env.json").read_text(encoding="utf-8")) for p in folder.iterdir() if (p / "DONE").is_file()}
    assert set(envs) == {"lora.r-4", "lora.r-8"}
    assert len((folder / "leaderboard.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert "ranked by" in said and "r=4" in said and "r=8" in said


def test_a_job_that_slurm_refuses_is_one_line(tmp_path, cluster):
    """This Slurm has no GPUs, and the preset asks for one."""
    process = sweep(tmp_path, cluster, "hydra.launcher.gpus_per_node=1")
    said, _ = process.communicate(timeout=200)
    last = said.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
    assert last.startswith("mmft: hydra/launcher=submitit_slurm: ") and "generic resource" in last and "gpus_per_node" in last


@pytest.mark.parametrize("how", ["signal", "requeue"])
def test_a_preempted_job_resumes_from_its_checkpoint(tmp_path, cluster, how):
    """The signal that Slurm is asked to send before a job's end; and `scontrol requeue`, which sends TERM and kills."""
    steps = 60
    process = sweep(tmp_path, cluster, f"trainer.max_steps={steps}", "trainer.save_strategy=steps", "trainer.save_steps=5")
    folder = tmp_path / "outputs" / "sweeps" / "queued"
    run = folder / "lora.r-4"
    waited(process, lambda: logged(run) > 8)
    job = next(line.split("|")[0] for line in queued(cluster, "%i|%K|%T") if line.split("|")[1] == "0")
    if how == "signal":
        subprocess.run(["scancel", "--signal=USR2", job], env=cluster, check=True)
    else:
        subprocess.run(["scontrol", "requeue", job], env=cluster, check=True)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-4000:]
    assert {p.parent.name for p in folder.glob("*/DONE")} == {"lora.r-4", "lora.r-8"} and not list(folder.rglob("earlier"))
    went_on = [json.loads(line) for line in (run / "resumed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(went_on) == 1 and not (folder / "lora.r-8" / "resumed.jsonl").exists(), went_on
    for name in ("lora.r-4", "lora.r-8"):
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    assert len((folder / "leaderboard.csv").read_text(encoding="utf-8").splitlines()) == 3
