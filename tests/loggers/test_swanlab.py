"""SwanLab offline, and online or local falling back to it; nothing here reaches a network."""

import importlib.util
import io
import sys

import pytest


def log_a_run(logger, run_dir, rows):
    run_dir.mkdir(exist_ok=True)
    config = {"seed": 1, "hub": {"access_token": "hf_abcdef", "api_key": "k-123456"}, "lora": {"r": 16}}
    logger.start(run_dir, "a run", config)
    logger.scalars(1, {"loss": 2.5, "eval_loss": 1.0})
    logger.samples(1, rows, "samples")
    logger.finish("done")


def contents(run_dir):
    return {p.relative_to(run_dir).as_posix(): p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def test_offline_writes_the_run_and_no_secret(make_logger, nobody, rows, tmp_path, capsys):
    run_dir = tmp_path / "run"
    log_a_run(make_logger("swanlab", "logger.mode=offline"), run_dir, rows)
    files = contents(run_dir)
    assert "instead of" not in capsys.readouterr().err
    assert all(name.startswith("swanlab/") for name in files)
    assert sum(name.endswith(".swanlab") for name in files) == 1
    config = next(v for k, v in files.items() if k.endswith("config.yaml")).decode()
    assert "r: 16" in config
    media = [k for k in files if "/media/" in k]
    assert sum(k.endswith(".png") for k in media) == 2 and sum(k.endswith(".txt") for k in media) == 3
    assert any(b"dark red" in v for k, v in files.items() if k.endswith(".txt"))
    blob = b"".join(files.values())
    assert b"train/loss" in blob and b"eval/loss" in blob and b"hardware/rss_mb" in blob
    assert b"hf_abcdef" not in blob and b"k-123456" not in blob
    assert not (tmp_path / "cwd" / "swanlog").exists()


@pytest.mark.parametrize("terminal", [False, True])
def test_online_without_an_account_goes_offline_with_one_line_and_asks_nothing(make_logger, nobody, rows, tmp_path, capsys, terminal):
    class Keyboard(io.StringIO):
        def isatty(self):
            return terminal

        def readline(self, *_):
            raise AssertionError("the run waited for someone to type")

    nobody.setattr(sys, "stdin", Keyboard())
    log_a_run(make_logger("swanlab"), tmp_path / "run", rows)
    err = capsys.readouterr().err
    assert err.count("mmft:") == 1 and "SwanLab logs offline instead of online: nobody is logged in" in err
    assert any(name.endswith(".swanlab") for name in contents(tmp_path / "run"))


def test_online_that_cannot_be_reached_goes_offline(make_logger, nobody, rows, tmp_path, capsys):
    import swanlab

    real = swanlab.init

    def init(**kwargs):  # the true client retries for ten seconds
        if kwargs["mode"] == "online":
            (tmp_path / "run" / "swanlab" / "run-failed").mkdir()  # which it has made by then
            raise swanlab.exceptions.AuthenticationError("Failed to initialize the SwanLab client.")
        return real(**kwargs)

    nobody.setenv("SWANLAB_API_KEY", "key-987654")
    nobody.setattr(swanlab, "init", init)
    log_a_run(make_logger("swanlab"), tmp_path / "run", rows)
    assert capsys.readouterr().err.count("mmft: SwanLab logs offline instead of online: Failed to") == 1
    files = contents(tmp_path / "run")
    assert any(name.endswith(".swanlab") for name in files) and b"key-987654" not in b"".join(files.values())
    assert not (tmp_path / "run" / "swanlab" / "run-failed").exists()


def test_local_without_the_dashboard_goes_offline(make_logger, nobody, rows, tmp_path, capsys):
    found = importlib.util.find_spec
    nobody.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "swanboard" else found(name, *rest))
    log_a_run(make_logger("swanlab", "logger.mode=local"), tmp_path / "run", rows)
    err = capsys.readouterr().err
    assert err.count("mmft:") == 1 and "offline instead of local" in err and "pip install 'swanlab[dashboard]'" in err
    assert any(name.endswith(".swanlab") for name in contents(tmp_path / "run"))


def test_disabled_writes_nothing(make_logger, nobody, rows, tmp_path):
    log_a_run(make_logger("swanlab", "logger.mode=disabled"), tmp_path / "run", rows)
    assert contents(tmp_path / "run") == {}


def test_both_logs_to_both(make_logger, nobody, rows, tmp_path, capsys):
    logger = make_logger("both", "logger.loggers.swanlab.mode=offline", "logger.loggers.tensorboard.hardware=false")
    log_a_run(logger, tmp_path / "run", rows)
    names = contents(tmp_path / "run")
    assert any("tensorboard/events" in n for n in names) and any(n.endswith(".swanlab") for n in names)
    assert capsys.readouterr().err.count("mmft:") == 0


def test_the_leaderboard_of_a_sweep_is_a_text_in_its_group(make_logger, nobody, tmp_path, capsys, monkeypatch):
    import swanlab
    from loggers.test_services import attach_a_leaderboard

    groups, real = [], swanlab.init
    monkeypatch.setattr(swanlab, "init", lambda **keys: groups.append((keys["group"], keys["name"])) or real(**keys))
    attach_a_leaderboard(make_logger("swanlab", "logger.mode=offline"), tmp_path / "ranks")
    texts = [v.decode() for k, v in contents(tmp_path / "ranks").items() if k.endswith(".txt") and "/media/" in k]
    assert groups == [("ranks", "ranks leaderboard")] and len(texts) == 1 and "| lora.r-4 | 4 |" in texts[0] and capsys.readouterr().err == ""
