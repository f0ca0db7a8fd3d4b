"""Hydra's launcher plugins run the points of a sweep in other processes on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

from mmft.config.plain import to_plain

SMALL = ["experiment=debug", "data.pictures=24", "data.splits.validation=4", "logger=none", "trainer.max_steps=1", "name=carried", "lora.r=2,4,8"]


def runs(tmp_path: Path) -> dict[str, dict]:
    """name -> summary of the finished runs."""
    folder = tmp_path / "outputs" / "sweeps" / "carried"
    return {p.parent.name: json.loads((p.parent / "summary.json").read_text(encoding="utf-8")) for p in folder.glob("*/DONE")}


def env(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "outputs" / "sweeps" / "carried" / name / "env.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("MMFT_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("MMFT_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_points_run_through_the_launcher_and_finished_ones_are_kept(mmft, tmp_path):
    """joblib with one worker runs in this process: fast, and through all of the launcher's code."""
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", *SMALL]
    code, _, err = mmft(*words)
    assert code == 0, err
    found = runs(tmp_path)
    assert set(found) == {"lora.r-2", "lora.r-4", "lora.r-8"} and {s["status"] for s in found.values()} == {"finished"}
    assert len({s["trainable_parameters"] for s in found.values()}) == 3
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("DONE")}
    code, out, err = mmft("-m", *SMALL)  # the same points through another launcher
    assert code == 0 and "3 of them finished already" in out, err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("DONE")} == before


def test_a_point_that_fails_in_a_worker_is_reported(mmft, tmp_path):
    words = [*SMALL[:-1], "lora.target_modules=all-linear,nothing_like_it"]
    code, _, err = mmft("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", *words)
    assert code == 1 and "failed:" in err and "nothing_like_it" in err
    assert len(runs(tmp_path)) == 1


@pytest.mark.parametrize(("launcher", "plugin", "extra"), [
    ("joblib", "hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "sweep"),
    ("submitit_slurm", "hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "slurm"),
    ("ray", "hydra_ray_launcher.ray_launcher.RayLauncher", "ray"),
])  # fmt: skip
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(mmft, monkeypatch, launcher, plugin, extra):
    from hydra.core.plugins import Plugins

    monkeypatch.delitem(Plugins.instance().class_name_to_class, f"hydra_plugins.{plugin}", raising=False)
    code, _, err = mmft("-m", f"hydra/launcher={launcher}", *SMALL)
    assert code == 2 and err.splitlines()[-1] == f"mmft: this launcher is not installed: pip install mmft[{extra}]"


@pytest.mark.parametrize("name", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_every_preset_of_a_launcher_composes(name):
    from omegaconf import OmegaConf

    from mmft.config import compose
    from mmft.sweeps import gpu_placement

    OmegaConf.register_new_resolver("mmft_workers", gpu_placement.workers, replace=True)
    cfg = compose.compose_hydra([f"hydra/launcher={name}"])
    with_dir = OmegaConf.merge(cfg, {"hydra": {"sweep": {"dir": "here"}}})
    assert to_plain(with_dir.hydra.launcher)["_target_"].startswith("hydra_plugins.")


@pytest.mark.long
def test_joblib_runs_points_in_several_processes_one_gpu_each(mmft, tmp_path, monkeypatch):
    """Two GPUs by name (no run here touches one): each process keeps its own, and env.json says which."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("MMFT_DEVICES", "0,1")
    code, _, err = mmft("-m", "hydra/launcher=joblib", "model.device=cpu", *SMALL)
    assert code == 0 and len(runs(tmp_path)) == 3, err
    placed = {env(tmp_path, name)["placement"]["cuda_visible_devices"] for name in runs(tmp_path)}
    assert placed <= {"0", "1"} and placed


@pytest.mark.long
def test_submitit_runs_points_on_this_machine(mmft, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    code, _, err = mmft("-m", "hydra/launcher=submitit_local", *SMALL)
    assert code == 0 and len(runs(tmp_path)) == 3, err
    assert list((tmp_path / "outputs" / "sweeps" / "carried" / ".submitit").iterdir())


@pytest.mark.long
def test_a_preempted_submitit_job_is_queued_again_and_resumes(tmp_path):
    """USR2 to every job, as Slurm sends it before a preemption: each saves, submitit starts it again, and it resumes from its checkpoint."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    import psutil

    words = [*SMALL, "trainer.max_steps=150", "trainer.logging_steps=1", "hydra/launcher=submitit_local", f"output_dir={(tmp_path / 'outputs').as_posix()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "mmft", "-m", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 200
    while time.time() < deadline and sum(1 for _ in tmp_path.rglob("metrics.jsonl")) < 3:
        time.sleep(0.2)
    jobs = [p for p in psutil.process_iter(["cmdline", "environ"]) if "submitit.core._submit" in " ".join(p.info["cmdline"] or ()) and str(tmp_path) in " ".join(p.info["cmdline"])]
    assert jobs, "no job was under way"
    for job in jobs:
        job.send_signal(signal.SIGUSR2)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said[-3000:]
    found = [p.parent for p in tmp_path.rglob("DONE")]
    assert len(found) == 3 and not list(tmp_path.rglob("earlier"))
    went_on = [run for run in found if (run / "resumed.jsonl").is_file()]
    assert went_on
    for run in found:
        steps = [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) if "loss" in row]
        assert steps == list(range(1, 151))


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="the launcher's Ray is for Linux and macOS")
def test_ray_runs_points_on_a_local_cluster(mmft, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    import ray

    try:
        code, _, err = mmft("-m", "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", *SMALL)
    finally:
        ray.shutdown()
    assert code == 0 and len(runs(tmp_path)) == 3, err
