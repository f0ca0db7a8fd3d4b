"""doctor: every check finds what it is for, secrets stay unseen, and the exit code tells needed from optional."""

import sys
import time

import pytest
from hub import Hub

from mmft.verbs import doctor_checks


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MODELSCOPE_OFFLINE", "1")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "nobody"))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)


def rows(out: str) -> dict[str, tuple[str, str]]:
    return {line.split()[1]: (line.split()[0], line) for line in out.splitlines() if line.split()[:1] and line.split()[0] in ("ok", "less", "broken")}


def test_one_line_each_and_zero_where_all_that_is_needed_works(mmft):
    code, out, err = mmft("doctor")
    assert code == 0, err
    found = rows(out)
    assert set(found) >= {"python", "packages", "torch", "device", "bf16", "torchvision", "bitsandbytes", "huggingface", "modelscope", "swanlab", "disk", "downloads"}
    assert found["torchvision"][0] == "ok" and found["huggingface"][0] == "less" and "HF_HUB_OFFLINE is set" in found["huggingface"][1]
    import torch

    assert torch.__version__ in found["torch"][1]
    assert all("  ->  " in line for state, line in found.values() if state == "broken")


def test_something_needed_that_is_broken_is_exit_code_1(mmft, monkeypatch, tmp_path):
    real = doctor_checks.importlib.metadata.version
    monkeypatch.setattr("mmft.verbs.doctor_checks.importlib.metadata.version", lambda name: "0.1" if name == "peft" else real(name))
    monkeypatch.setattr("mmft.verbs.doctor_checks.importlib.metadata.requires", lambda name: ["peft>=0.21", "torch>=2.10", 'gradio>=6; extra == "ui"'])
    monkeypatch.setattr("mmft.verbs.doctor_checks.shutil.disk_usage", lambda path: type("Usage", (), {"free": 5 << 20})())
    code, out, err = mmft("doctor")
    assert code == 1 and err == "mmft: needed and broken: packages, disk\n"
    found = rows(out)
    assert "peft 0.1 is not >=0.21" in found["packages"][1] and "a run needs 64 MB" in found["disk"][1]


def test_a_torch_and_torchvision_that_do_not_fit_are_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    found = {f.name: f for f in doctor_checks.machine()}
    assert found["torch"].state == "ok" and found["torchvision"].state == "broken" and "together" in found["torchvision"].fix


def test_bitsandbytes_that_fails_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    found = doctor_checks.quantising()
    assert found.state == "less" and "pip install" in found.fix


def test_a_hub_that_answers_and_one_that_does_not(monkeypatch):
    with Hub() as hub:
        assert doctor_checks.hub("huggingface", hub.url, "HF_ENDPOINT", "NOT_OFFLINE", 3).state == "ok", "any answer counts, a 404 too"
        dead = hub.url
    started = time.time()
    found = doctor_checks.hub("huggingface", dead, "HF_ENDPOINT", "NOT_OFFLINE", 1)
    assert found.state == "less" and "HF_ENDPOINT" in found.fix and time.time() - started < 3
    assert doctor_checks.hub("huggingface", "nonsense", "HF_ENDPOINT", "NOT_OFFLINE", 1).state == "less"


def test_a_hub_that_never_answers_takes_no_longer_than_the_timeout():
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.time()
        found = doctor_checks.hub("modelscope", f"http://127.0.0.1:{silent.getsockname()[1]}", "MODELSCOPE_ENDPOINT", "NOT_OFFLINE", 0.5)
    assert found.state == "less" and "does not answer" in found.text and time.time() - started < 3


def test_endpoints_are_those_of_the_environment_and_passwords_are_not_shown(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:hunter2@127.0.0.1:9")
    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "mirror.example")
    (face, scope) = doctor_checks.hubs()
    assert scope[1] == "https://mirror.example"
    found = doctor_checks.hub(*face[:3], "NOT_OFFLINE", 1)
    assert "127.0.0.1:9" in found.text and "hunter2" not in found.text + found.fix


def test_the_swanlab_key_is_never_printed(mmft, monkeypatch):
    monkeypatch.setenv("SWANLAB_API_KEY", "k" * 21)
    code, out, err = mmft("doctor")
    assert rows(out)["swanlab"][0] == "ok" and "kkk" not in out + err
