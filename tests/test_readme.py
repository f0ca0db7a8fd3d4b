"""The READMEs' two set-up commands and the checks before a commit are those of CI; test_docs.py checks every other command."""

import yaml
from places import ROOT


def test_the_two_setup_commands_are_the_ones_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "pip install -e . && python -m mmft" in text and "pip install -e '.[dev]' && pytest" in text
    assert "install -q -e ." in ci and "python -m mmft" in ci and "install -q -e '.[dev]'" in ci and "\npytest" in ci


def test_what_runs_before_a_commit_runs_in_ci_too():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is downloaded before a commit"
    for hook in hooks[0]["hooks"]:
        tool = hook["entry"].removeprefix("python -m ").split()[0]
        assert f"\n{tool}" in ci, tool
    assert "sphinx -W" in ci
