"""The documentation: every command composes, those that can be run here run, the site builds, the reference knows every key."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import Shown, commands, key_cells, saved_files
from places import ROOT

from mmft.cli import parse
from mmft.cli.help import help_text
from mmft.config import compose, sweep_overrides
from mmft.config.command import Command
from mmft.config.groups import CONFIG_DIR
from mmft.config.snapshot import snapshot

COMMANDS = commands()
# Training on the built-in data, made small; what a page types itself stays.
SMALL = {"trainer.max_steps": 4, "data.pictures": 96, "data.splits.validation": 16, "evaluation.max_samples": 4, "generation.max_new_tokens": 8}


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    """A folder that holds what the pages tell their readers to save, and a snapshot and a group for the placeholders RUN and MY_CONF."""
    folder = tmp_path_factory.mktemp("desk")
    files = saved_files() | {"RUN/snapshot.yaml": snapshot(compose.compose([])), "MY_CONF/model/mine.yaml": "defaults: [tiny, _self_]\n"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_pages_hold_commands_and_files():
    assert len(COMMANDS) > 100 and {"draw.py", "tutorial/conf/data/drawings.yaml"} <= saved_files().keys()
    assert {c.page for c in COMMANDS} >= {"README.md", "README.zh-CN.md", "docs/tutorial.md", "docs/zh.md", "docs/launchers.md"}


def test_every_verb_has_a_page_with_its_commands():
    for verb in parse.verbs():
        page = f"docs/howto/{verb}.md"
        shown = [c for c in COMMANDS if c.page == page]
        assert any(c.words[:1] == (verb,) or (verb == "train" and "=" in "".join(c.words[:1])) for c in shown), page


@pytest.mark.parametrize("shown", {c.words: c for c in reversed(COMMANDS)}.values(), ids=str)
def test_a_command_composes(shown, desk, monkeypatch):
    monkeypatch.chdir(desk)
    command = parse.parse(list(shown.words))
    if command.help:
        assert "usage" in help_text(command)
    elif command.multirun and not any("interval(" in w for w in shown.words):
        assert sweep_overrides.check_sweep(command.overrides, command.config_dir, command.config_name)[0] or any(w.startswith("experiment=search") for w in shown.words)
    else:  # a search draws from its intervals: their first value stands for all
        words = sweep_overrides.first_values(command.overrides) if command.multirun else command.overrides
        assert compose.compose(words, command.config_dir, command.config_name).model.path


def test_the_keys_beside_other_tools_keys_are_ours():
    """All cells of docs/coming-from.md, as many in one config as do not name the same key twice."""
    cells = [shlex.split(code) for code in key_cells()]
    cells = [parse.parse(words[1:]).overrides if words[0] == "mmft" else words for words in cells if words != ["mmft", "key=value", "..."]]
    packs: list[list[str]] = []
    for words in cells:
        keys = {w.split("=")[0] for w in words}
        verb = any(w.startswith("task=") for w in words)
        for pack in packs:
            if not verb and not keys & {w.split("=")[0] for w in pack} and not {"task", "data", "lora"} & (keys | {w.split("=")[0] for w in pack}):
                pack += words
                break
        else:
            packs.append(list(words))
    assert len(cells) > 50
    for words in packs:
        given = {w.split("=")[0] for w in words}
        if "data" in given and not given & {"data.path", "data.dataset"}:
            words += ["data.dataset=O/N"] if "data=hub" in words else ["data.path=x"]
        assert compose.compose(words).seed == 42, words


# --- for real -----------------------------------------------------------------------------------------------------


def why_not(command: Command) -> str | None:
    """Why a command cannot be run here; None where it can."""
    words = dict(w.lstrip("+").split("=", 1) for w in command.overrides if "=" in w)
    if command.help or command.hydra:
        return None
    if command.verb in ("serve", "benchmark") or words.get("task.ui") == "true" or "task.push" in words:
        return "serves a page, or uploads"
    if words.get("hydra/launcher", "joint") not in ("joint", "joblib", "basic"):
        return "needs a cluster's packages"
    run = words.get("task.run")
    if run is not None:
        return next((f"no {folder}" for folder in run.strip("[]").split(",") if not Path(folder).is_dir()), None)
    first = sweep_overrides.first_values(command.overrides)
    cfg = compose.compose(first, command.config_dir, command.config_name)
    if command.verb in ("doctor", "report"):
        return None
    if command.verb == "assemble":
        return None if Path(cfg.task.llm).is_dir() else "the models of a hub"
    if not cfg.model.path.startswith("mmft:") and not Path(cfg.model.path).is_dir():
        return "a model of a hub"
    if cfg.task.get("input") and not Path(cfg.task.input).exists():
        return f"no {cfg.task.input}"
    if cfg.data._target_.endswith((".Shapes", ".Scenes")):
        return None
    paths = [node.get("path") for node in (cfg.data.get("sources") or {"": cfg.data}).values()]  # of each source of a mix
    return None if all(path and Path(path).exists() for path in paths) else "a data set of the reader's, or of a hub"


def small(command: Command, words: list[str]) -> list[str]:
    """A page's command with less to do: built-in data, few steps, two values of a sweep, two trials of a search."""
    if command.verb not in (None, "train") or command.hydra:
        return words
    given = {w.split("=")[0] for w in words}
    if command.multirun:
        words = [re.sub(r"^((?:lora\.r|seed)=[^,(]+,[^,]+),.*", r"\1", w) for w in words if not w.startswith("hydra.sweeper.n_trials")]
        if any("optuna" in w or w.startswith("experiment=search") for w in words):
            words.append("hydra.sweeper.n_trials=2")
    if not {"data", "experiment"} & given or "experiment=rank_sweep" in words or "experiment=rank_sweep_rslora" in words:
        words += [f"{k}={v}" for k, v in SMALL.items() if k not in given]
    return words


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_commands_that_can_be_run_here_run(desk, monkeypatch, capfd):
    """In the pages' order, in one folder: later pages use the tutorial's run."""
    from mmft.cli.main import main

    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115  # a conversation ends at once
    subprocess.run([sys.executable, "draw.py"], check=True)
    ran: list[Shown] = []
    left: list[tuple[Shown, str]] = []
    done: set[tuple[str, ...]] = set()
    for shown in COMMANDS:
        if shown.words in done:
            continue
        done.add(shown.words)
        command = parse.parse(list(shown.words))
        reason = why_not(command)
        if reason:
            left.append((shown, reason))
            continue
        capfd.readouterr()
        code = main(small(command, list(shown.words)))
        out, err = capfd.readouterr()
        assert code == 0, f"{shown}\n{out[-1500:]}\n{err[-1500:]}"
        ran.append(shown)
    with capfd.disabled():
        print(f"\n{len(ran)} commands of the pages ran, {len(left)} were composed only:")
        for shown, reason in left:
            print(f"  {shown}  ({reason})")
    assert len(ran) > 50 and {s.page for s in ran} >= {"docs/tutorial.md", *(f"docs/howto/{v}.md" for v in ("train", "predict", "merge", "reproduce"))}
    assert not [s for s, _ in left if s.page == "docs/tutorial.md" and "model=qwen2vl" not in s.words], "the tutorial runs whole"
    # what the tutorial says of its figures
    summary = json.loads((desk / "tutorial" / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["base_metrics"]["exact_match"] == 0 and summary["metrics"]["exact_match"] > 0.75
    with (desk / "tutorial" / "answers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and all(r["prediction"].startswith("left ") for r in rows)


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs pip install -e '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    index = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    top = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text(encoding="utf-8"))
    assert all(f">{key}<" in index for key in top if key not in ("defaults", "evaluation", "generation"))
    page = (tmp_path / "site" / "reference" / "trainer.html").read_text(encoding="utf-8")
    assert "trainer.adam_beta2" in page, "a key that no yaml lists"
    everything = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html"))
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", everything), "a page that opens offline fetches nothing"


def test_the_reference_knows_every_key_of_every_yaml(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import reference

    text = "\n".join(p.read_text(encoding="utf-8") for p in reference.write(tmp_path / "reference"))
    for file in CONFIG_DIR.rglob("*.yaml"):
        group = file.relative_to(CONFIG_DIR).parts[0]
        if file.name in ("config.yaml", "mmft.yaml"):
            continue
        prefix = {"task": "", "experiment": "", "hydra": f"hydra.{file.parent.name}."}.get(group, f"{group}.")
        for key, value in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            if key not in ("_target_", "defaults") and not isinstance(value, dict):
                assert f"| `{prefix}{key}` |" in text, f"{file}: {key}"
    for section, (_, read) in reference.LIBRARIES.items():
        assert all(f"`{section}.{key}`" in text for key in read())


def test_a_comment_of_a_yaml_is_the_meaning_of_its_key():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from mmft.config.comments import Key, keys_of
    finally:
        sys.path.pop(0)
    text = "# The file.\na: 1    # one\n# above\nb: {x: 2}   # behind\nc:\n  d: null  # inner\n  e: '#'\nlist:\n- 1\n"
    assert keys_of(text, "p.") == [
        Key("p.a", "1", "one"), Key("p.b", "{x: 2}", "above; behind"), Key("p.c.d", "null", "inner"), Key("p.c.e", "'#'", ""), Key("p.list", "- 1", ""),
    ]  # fmt: skip


# --- the tour of the code -----------------------------------------------------------------------------------------


@pytest.fixture
def diagram(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import diagram

    return diagram


def test_the_diagram_is_drawn_from_this_code(diagram):
    assert diagram.TARGET.read_text(encoding="utf-8") == diagram.drawing(), "python docs/diagram.py draws it again"


def test_the_diagram_refuses_a_cycle_and_leaves_out_what_follows(diagram):
    edges = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert diagram.levels(edges) == {"c": 0, "b": 1, "a": 2}
    assert diagram.direct(edges) == [("a", "b"), ("b", "c")]
    with pytest.raises(ValueError, match="a, b"):
        diagram.levels({"a": {"b"}, "b": {"a"}, "c": set()})


def test_the_tour_has_a_paragraph_for_each_package_in_the_order_of_the_imports(diagram):
    from test_architecture import ORDER

    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    order = re.findall(r"\w+", re.search(r"^```text\n(common <.*?)^```", text, re.S | re.M)[1])
    assert order == [name for name in dict.fromkeys(ORDER) if name in diagram.packages()] and set(order) == diagram.packages().keys()
    assert re.findall(r"^\*\*(\w+)\*\* ", text, re.M) == order


def test_every_file_and_function_that_a_page_names_exists(diagram):
    """A path in code is a file; names in code behind `FILE`: are its functions, classes, methods, or keys of a yaml."""
    pages = [p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "reference"]
    pages += [*(ROOT / "experiments").glob("*/README.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]
    missing, named = [], 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for file, names in re.findall(r"`((?:mmft|tests|conf|docs|benchmarks|experiments)/[a-z_0-9./]+\.\w+)`(?:: ((?:`[\w.]+`(?:, )?)+))?", text):
            if file in saved_files() or re.search(rf"[Cc]reate\s`{file}`", text):  # the reader makes it
                continue
            path = ROOT / file
            wanted = re.findall(r"`([\w.]+)`", names)
            named += len(wanted)
            if not path.is_file():
                missing.append(f"{page.relative_to(ROOT)}: {file}")
            elif path.suffix == ".py":
                missing += [f"{page.relative_to(ROOT)}: {file}: {name}" for name in wanted if not diagram.defined(path, name)]
            else:
                keys = re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.M)
                missing += [f"{page.relative_to(ROOT)}: {file}: {name}" for name in wanted if name not in keys]
    assert not missing and named >= 10


def test_every_test_that_the_guarantees_name_exists():
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    functions = re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.M)
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("guarantees.md", "guarantees-data.md"))
    for name, shortened in re.findall(r"\b(test_\w+(?:\.py)?)(\.\.\.)?", text):
        assert name in files or name in functions or (shortened and any(f.startswith(name) for f in functions)), name


# --- the recipes of CONTRIBUTING.md -------------------------------------------------------------------------------


@pytest.mark.long
def test_the_recipes_of_contributing_work_as_written(tmp_path):
    """A data source, a logger and a verb, made in a copy of the code from the page alone."""
    from PIL import Image

    for folder in ("mmft", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"Create `([^`]+\.(?:py|yaml))`.*?\n\n```\w+\n(.*?)^```", text, re.S | re.M):
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "pairs").mkdir()
    for number, colour in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (60, 60 + number), colour).save(tmp_path / "pairs" / f"{number}.png")
        (tmp_path / "pairs" / f"{number}.txt").write_text(f"a {colour} picture\n", encoding="utf-8")
    (tmp_path / "pairs" / "alone.txt").write_text("no picture", encoding="utf-8")

    def command(*words: str, code: int = 0) -> str:
        done = subprocess.run([sys.executable, "-m", "mmft", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "alone.txt: no image" in command("prepare", "data=pairs", "data.path=pairs", code=2)
    assert "4 images" in command("prepare", "data=pairs", "data.path=pairs", "data.max_bad_share=0.2", "data.splits.validation=1")
    assert "no .txt files" in command("prepare", "data=pairs", "data.path=conf", code=2)
    command("logger=csv", "trainer.max_steps=2", "trainer.logging_steps=1", "data.pictures=40", "data.splits.validation=8", "evaluation.split=null", "run_dir=run")
    written = (tmp_path / "run" / "scalars.csv").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert written[0] == "step,name,value" and [float(line.split(",")[2]) for line in written if ",loss," in line] == losses and len(losses) == 2
    assert "only the last N logged steps" in command("losses", "--help")
    shown = command("losses", "run=run", "last=1")
    assert f"loss {losses[1]}" in shown and f"loss {losses[0]}" not in shown
    assert "Did you mean last?" in command("losses", "run=run", "lst=1", code=2)
