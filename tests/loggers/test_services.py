"""Weights & Biases offline, MLflow in a database file, Trackio in a local one: read back with their own libraries. Nothing here reaches a network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECRETS = ("hf_abcdef", "k-123456", "planted-key-987654")
CONFIG = {"seed": 1, "hub": {"access_token": "hf_abcdef", "api_key": "k-123456"}, "lora": {"r": 16, "target_modules": ["q", "v"]}, "none": None}


def have(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Nobody is logged in, and secrets lie in the environment."""
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-987654")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def log_a_run(logger, run_dir: Path, rows) -> None:
    run_dir.mkdir(parents=True)
    logger.start(run_dir, "a run", CONFIG)
    logger.scalars(1, {"loss": 2.5, "eval_loss": 1.0, "note": "no number"})
    logger.scalars(2, {"loss": 2.0})
    logger.samples(2, rows, "held out")
    (run_dir / "report.html").write_text("<h1>The report</h1>", encoding="utf-8")
    logger.finish("finished")


def no_secret(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            blob = path.read_bytes()
            assert not [secret for secret in SECRETS if secret.encode() in blob], path


def wandb_records(path: Path):
    """The records of a .wandb file: a log in the form of LevelDB, in blocks of 32 KB behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@have("wandb")
def test_wandb_offline(make_logger, rows, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", sys)  # wandb advertises to who has imported it
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "plan.json").write_text("{}", encoding="utf-8")
    run_dir = tmp_path / "sweep" / "run"
    log_a_run(make_logger("wandb", "logger.mode=offline"), run_dir, rows)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    [file] = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    no_secret(tmp_path / "sweep")
    history, config, group = [], {}, ""
    deadline = time.time() + 20
    records = list(wandb_records(file))
    while not (records and records[-1].HasField("exit")) and time.time() < deadline:  # a process of its own writes the file
        time.sleep(0.1)
        records = list(wandb_records(file))
    for record in records:
        if record.HasField("history"):
            history.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
        if record.HasField("run"):
            group = record.run.run_group
            config = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.run.config.update}
    assert [(h["step"], h["train/loss"]) for h in history if "train/loss" in h] == [(1, 2.5), (2, 2.0)]
    assert [h["eval/loss"] for h in history if "eval/loss" in h] == [1.0] and any("hardware/rss_mb" in h for h in history)
    assert group == "sweep" and config["lora"]["r"] == 16 and config["hub"] == {"access_token": "***", "api_key": "***"}
    [table] = run_dir.glob("wandb/offline-run-*/files/media/table/**/*.table.json")
    cells = json.loads(table.read_text(encoding="utf-8"))
    assert cells["columns"] == ["id", "picture", "prompt", "reference", "answer"] and [row[4] for row in cells["data"]] == ["a red\n```field", "", "green"]
    pictures = [p for p in (tmp_path / "wandb-data").rglob("*") if p.is_file() and p.read_bytes().startswith(b"\x89PNG")]  # staged for the upload
    assert len(pictures) == 2 and [row[1] is None for row in cells["data"]] == [False, False, True]
    assert any("The report" in p.read_text(encoding="utf-8") for p in run_dir.glob("wandb/offline-run-*/files/media/html/**/*.html"))


@have("wandb")
def test_wandb_online_without_a_key_or_a_network_goes_offline(make_logger, rows, tmp_path, monkeypatch, capsys):
    import wandb

    real = wandb.init

    def init(**keys):
        if keys["mode"] == "online":  # the true client tries for half a minute
            raise wandb.errors.CommError("Run initialization has timed out")
        return real(**keys)

    monkeypatch.setattr(wandb, "init", init)
    log_a_run(make_logger("wandb"), tmp_path / "a", rows)
    assert capsys.readouterr().err.count("instead of online: Run initialization has timed out") == 1
    monkeypatch.delenv("WANDB_API_KEY")
    log_a_run(make_logger("wandb"), tmp_path / "b", rows)
    assert capsys.readouterr().err.count("instead of online: nobody is logged in") == 1
    assert all(list((tmp_path / name).glob("wandb/offline-run-*/run-*.wandb")) for name in "ab")


@pytest.mark.long
@have("mlflow")
def test_mlflow_in_a_file(make_logger, rows, tmp_path, capfd):
    from mlflow import MlflowClient

    run_dir = tmp_path / "outputs" / "run"
    log_a_run(make_logger("mlflow"), run_dir, rows)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("mmft").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["lora.r"] == "16" and run.data.params["hub.api_key"] == "***" and "none" not in run.data.params
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 2.5), (2, 2.0)]
    assert run.data.metrics["eval/loss"] == 1.0 and "hardware/rss_mb" in run.data.metrics
    table = json.loads(next((tmp_path / "outputs" / "mlflow").rglob("held_out.json")).read_text(encoding="utf-8"))
    assert table["columns"] == ["step", "id", "picture", "prompt", "reference", "answer"] and [row[4:] for row in table["data"]] == [["red", "a red\n```field"], ["red, blue", ""], ["none", "green"]]
    assert len(list((tmp_path / "outputs" / "mlflow").rglob("*.png"))) == 2 and list((tmp_path / "outputs" / "mlflow").rglob("report.html"))
    no_secret(tmp_path / "outputs")
    failed = make_logger("mlflow")
    failed.start(run_dir, "another", {})
    failed.finish("interrupted")
    assert {r.info.status for r in client.search_runs([run.info.experiment_id])} == {"FINISHED", "KILLED"}


@have("trackio")
def test_trackio_in_a_file(tmp_path, rows):
    """In a process of its own: Trackio reads its folder when it is imported."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[3])\nfrom loggers.test_services import log_a_run\nfrom mmft.loggers.trackio import Trackio\n"
        "log_a_run(Trackio(folder=sys.argv[1]), Path(sys.argv[1]) / 'run', json.loads(sys.argv[2]))\n", encoding="utf-8")  # fmt: skip
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, str(program), str(tmp_path / "track"), json.dumps(rows), str(tests)], capture_output=True, text=True, cwd=tests.parent)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "", done.stderr
    [database] = (tmp_path / "track").glob("mmft.db")
    with contextlib.closing(sqlite3.connect(database)) as opened:
        logged = [json.loads(row[0]) for row in opened.execute("select metrics from metrics order by step, id")]
        configs = " ".join(str(row) for row in opened.execute("select * from configs"))
    losses = [row["train/loss"] for row in logged if "train/loss" in row]
    [table] = [row["held out/answers"] for row in logged if "held out/answers" in row]
    assert losses == [2.5, 2.0] and [row["answer"] for row in table["_value"]] == ["a red\n```field", "", "green"]
    assert '"r":16' in configs.replace(' ', '') and len(list((tmp_path / "track").rglob("*.png"))) == 2
    no_secret(tmp_path / "track")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_without_the_package_it_is_one_line(mmft, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package, *rest: None if package == name else found(package, *rest))
    code, _, err = mmft(f"logger={name}")
    assert code == 2 and err == f"mmft: logger={name}: needs a package that is not installed: pip install 'mmft[{name}]'\n"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_logger_that_fails_does_not_stop_a_run(mmft, tmp_path, monkeypatch, name):
    """Every hook raises; the run finishes, and one line says that the logger is off."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"no {name}")
    module = importlib.import_module(f"mmft.loggers.{name}")
    owner = getattr(module, {"wandb": "Wandb", "mlflow": "Mlflow", "trackio": "Trackio"}[name])
    for hook in ("open", "write_scalars", "write_samples", "close"):
        monkeypatch.setattr(owner, hook, lambda *_: (_ for _ in ()).throw(RuntimeError("the service is\ndown")))
    code, _, err = mmft(f"logger={name}", "trainer.max_steps=1", "data.pictures=24", "data.splits.validation=4", "evaluation.max_samples=2", "generation.max_new_tokens=2", f"run_dir={tmp_path / 'run'}")
    assert code == 0 and err.count(f"{owner.__name__} logger is off: the service is down") == 1 and (tmp_path / "run" / "DONE").is_file()


# --- the leaderboard of a sweep: as a run of its own, in the sweep's group ---------------------------------------------

COLUMNS, ROWS = ["run", "lora.r", "eval_loss", "marks"], [["lora.r-4", 4.0, 1.25, "best"], ["lora.r-8", 8.0, "", ""]]


def attach_a_leaderboard(logger, folder: Path) -> None:
    from mmft.loggers.base import Board

    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    (folder / "report.html").write_text("<h1>The board</h1>", encoding="utf-8")
    logger.leaderboard(folder, Board(COLUMNS, ROWS, "| run | lora.r |\n|---|---|\n| lora.r-4 | 4 |\n"))


@have("wandb")
def test_wandb_gets_the_leaderboard(make_logger, tmp_path, capfd):
    attach_a_leaderboard(make_logger("wandb", "logger.mode=offline"), tmp_path / "ranks")
    assert capfd.readouterr() == ("", "")
    [file] = (tmp_path / "ranks").glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.time() + 20
    while not ((records := list(wandb_records(file))) and records[-1].HasField("exit")) and time.time() < deadline:
        time.sleep(0.1)
    assert [(r.run.run_group, r.run.display_name) for r in records if r.HasField("run")][0] == ("ranks", "ranks leaderboard")
    [table] = (tmp_path / "ranks").glob("wandb/offline-run-*/files/media/table/**/*.table.json")
    cells = json.loads(table.read_text(encoding="utf-8"))
    assert cells["columns"] == COLUMNS and cells["data"] == ROWS
    assert any("The board" in p.read_text(encoding="utf-8") for p in (tmp_path / "ranks").glob("wandb/offline-run-*/files/media/html/**/*.html"))
    no_secret(tmp_path / "ranks")


@pytest.mark.long
@have("mlflow")
def test_mlflow_gets_the_leaderboard_beside_the_points(make_logger, rows, tmp_path, capfd):
    from mlflow import MlflowClient

    folder = tmp_path / "sweeps" / "ranks"
    attach_a_leaderboard(make_logger("mlflow"), folder)
    log_a_run(make_logger("mlflow"), folder / "lora.r-4", rows)
    assert capfd.readouterr() == ("", "")
    client = MlflowClient(f"sqlite:///{tmp_path}/sweeps/mlflow.db")
    found = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("mmft").experiment_id])}
    assert {name: run.data.tags["mmft.sweep"] for name, run in found.items()} == {"ranks leaderboard": "ranks", "a run": "ranks"}
    table = json.loads(next((tmp_path / "sweeps" / "mlflow").rglob("leaderboard.json")).read_text(encoding="utf-8"))
    assert table["columns"] == COLUMNS and table["data"] == ROWS
    assert "report.html" in {artifact.path for artifact in client.list_artifacts(found["ranks leaderboard"].info.run_id)}


@have("trackio")
def test_trackio_gets_the_leaderboard(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\nfrom loggers.test_services import attach_a_leaderboard\nfrom mmft.loggers.trackio import Trackio\n"
        "attach_a_leaderboard(Trackio(folder=sys.argv[1]), Path(sys.argv[1]) / 'ranks')\n", encoding="utf-8")  # fmt: skip
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, str(program), str(tmp_path / "track"), str(tests)], capture_output=True, text=True, cwd=tests.parent)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    [database] = (tmp_path / "track").glob("mmft.db")
    with contextlib.closing(sqlite3.connect(database)) as opened:
        [logged] = [json.loads(row[0]) for row in opened.execute("select metrics from metrics")]
        configs = " ".join(str(row) for row in opened.execute("select * from configs"))
    assert [[row[c] for c in COLUMNS] for row in logged["leaderboard"]["_value"]] == ROWS and "ranks" in configs
