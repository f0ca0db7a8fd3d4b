"""The READMEs' two set-up commands are those that CI runs; every other command of theirs is checked by test_docs.py."""

from places import ROOT


def test_the_two_setup_commands_are_the_ones_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "pip install -e . && python -m mmft" in text and "pip install -e '.[dev]' && pytest" in text
    assert "install -q -e ." in ci and "python -m mmft" in ci and "install -q -e '.[dev]'" in ci and "\npytest" in ci
