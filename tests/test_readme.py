"""Every mmft command in the READMEs composes; the runnable ones are run here or by .ci/run."""

import re
import shlex

import pytest
from places import ROOT

from mmft import cli, config

FILES = ("README.md", "README.zh-CN.md")


def commands() -> list[tuple[str, str]]:
    found = []
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for line in re.findall(r"^(?:mmft|python -m mmft) .*$", text, re.M) + re.findall(r"`((?:mmft|python -m mmft) [^`]+)`", text):
            command = re.sub(r"^(mmft|python -m mmft)\s*", "", line.split("#")[0].strip())
            found.append((name, " ".join(command.split())))
    return sorted(set(found))


def test_the_readmes_hold_commands():
    assert len(commands()) > 20


@pytest.mark.parametrize("name, words", commands())
def test_a_command_of_the_readme_is_one_that_works(name, words):
    command = cli.parse(shlex.split(words))
    if command.help:
        assert "usage" in cli.help_text(command)
    elif re.search(r"\b(RUN|DIR|MY_CONF)\b", words):  # a run of the reader's own: the verb and its keys are what can be checked
        assert command.verb in cli.verbs() or command.config_dir in ("RUN", "MY_CONF")
    elif command.multirun:
        assert config.check_sweep(command.overrides, None, "config")
    else:
        assert config.compose(command.overrides).model.path


def test_the_two_setup_commands_are_the_ones_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "pip install -e . && python -m mmft" in text and "pip install -e '.[dev]' && pytest" in text
    assert "install -q -e ." in ci and "python -m mmft" in ci and "install -q -e '.[dev]'" in ci and "\npytest" in ci
