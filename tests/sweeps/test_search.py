"""Searches with Optuna: the search space from Hydra's grammar, continued studies, pruned points."""

import json
import sys
from pathlib import Path

import pytest

from mmft.config.plain import to_plain

SMALL = ["experiment=debug", "data.pictures=24", "data.splits.validation=4", "logger=none", "hydra/sweeper=optuna", "name=found"]
SPACE = ["lora.r=choice(2,4)", "trainer.learning_rate=tag(log,interval(1e-4,1e-2))"]


def distribution(word: str):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from mmft.sweeps.optuna_study import distribution

    return distribution(OverridesParser.create().parse_override(word))


def trials(folder: Path) -> list:
    import optuna

    from mmft.sweeps.optuna_study import JOURNAL, STUDY, storage

    return optuna.load_study(study_name=STUDY, storage=storage(folder / JOURNAL)).get_trials()


@pytest.mark.parametrize(("word", "kind", "values"), [
    ("lora.r=choice(4,16)", "CategoricalDistribution", {"choices": ("4", "16")}),
    ("lora.r=4,16", "CategoricalDistribution", {"choices": ("4", "16")}),
    ("lora.target_modules=choice(all-linear,[q_proj,v_proj])", "CategoricalDistribution", {"choices": ("all-linear", "[q_proj,v_proj]")}),
    ("lora.r=range(2,9,2)", "IntDistribution", {"low": 2, "high": 8, "step": 2, "log": False}),
    ("lora.r=int(interval(2,64))", "IntDistribution", {"low": 2, "high": 64, "log": False}),
    ("lora.r=tag(log,int(interval(2,64)))", "IntDistribution", {"low": 2, "high": 64, "log": True}),
    ("lora.lora_dropout=interval(0,0.2)", "FloatDistribution", {"low": 0.0, "high": 0.2, "log": False}),
    ("trainer.learning_rate=tag(log,interval(1e-5,1e-3))", "FloatDistribution", {"low": 1e-5, "high": 1e-3, "log": True}),
])  # fmt: skip
def test_hydras_grammar_becomes_optunas_distributions(word, kind, values):
    found = distribution(word)
    assert type(found).__name__ == kind
    assert {k: getattr(found, k) for k in values} == values


@pytest.mark.long
def test_a_search_is_continued_by_the_same_command_and_no_point_is_trained_twice(mmft, tmp_path):
    code, out, err = mmft("-m", *SMALL, *SPACE, "hydra.sweeper.n_trials=2")
    assert code == 0, err
    folder = tmp_path / "outputs" / "sweeps" / "found"
    first = trials(folder)
    done = {f: f.stat().st_mtime_ns for f in folder.glob("*/DONE")}
    assert len(first) == 2 and [t.state.name for t in first] == ["COMPLETE"] * 2 and done
    for trial in first:  # what Optuna was told is what the run's own summary says
        summary = json.loads((folder / trial.user_attrs["point"] / "summary.json").read_text(encoding="utf-8"))
        assert trial.value == summary["eval_loss"]
    code, out, err = mmft("-m", *SMALL, *SPACE, "hydra.sweeper.n_trials=3")
    assert code == 0, err
    after = trials(folder)
    assert [t.params for t in after[:2]] == [t.params for t in first] and len(after) == 3
    assert after[2].params not in [t.params for t in first]
    assert {f: f.stat().st_mtime_ns for f in done} == done
    best = min(after, key=lambda t: t.value)
    assert f"best           eval_loss {best.value:.6g}  lora.r={best.params['lora.r']}" in out


def test_an_interrupted_search_continues_with_the_same_trials(tmp_path):
    """A search that is killed in its third trial and continued has the points of an undisturbed one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from mmft.sweeps.optuna_study import Search

    space = OverridesParser.create().parse_overrides(["lora.r=range(2,40)", "trainer.learning_rate=interval(0,1)"])

    class Point:
        def __init__(self, words):
            self.name, self.words = "_".join(words), words

    def run(folder: Path, die_at: int | None, seen: list) -> None:
        search = Search(folder, "eval_loss", space, n_trials=6, seed=3)

        def train(points):
            if len(seen) == die_at:
                raise KeyboardInterrupt
            seen.extend(p.words for p in points)
            return [{"run": p.name, "status": "finished", "objective": float(p.words[1].split("=")[1])} for p in points]

        search.run(Point, train)

    whole, cut = [], []
    run(tmp_path / "whole", None, whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 2, cut)
    run(tmp_path / "cut", None, cut)
    assert len(whole) == len(cut) == 6
    assert cut[:3] == whole[:3]  # the third was killed, and was the first to be asked for again
    assert [t.state.name for t in trials(tmp_path / "cut")].count("COMPLETE") == 6


@pytest.mark.long
def test_pruned_points_say_so_and_are_not_trained_again(mmft, tmp_path):
    """A threshold below every loss of this model: every point is pruned at its first evaluation."""
    words = [*SMALL, "lora.r=choice(2,4)", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.max_steps=4",
             "hydra.sweeper.pruner=ThresholdPruner", "hydra.sweeper.pruner_options={upper:0.001}", "hydra.sweeper.n_trials=2"]  # fmt: skip
    code, out, err = mmft("-m", *words)
    assert code == 0, err
    folder = tmp_path / "outputs" / "sweeps" / "found"
    assert [t.state.name for t in trials(folder)] == ["PRUNED"] * 2
    for trial in {t.user_attrs["point"]: t for t in reversed(trials(folder))}.values():  # the first that asked for each
        run = folder / trial.user_attrs["point"]
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        assert summary["status"] == "pruned" and summary["steps"] == 1 and summary["eval_loss"] == trial.intermediate_values[1]
        assert "pruned at step 1: eval_loss" in summary["reason"] and not (run / "DONE").exists()
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*/summary.json")}
    code, out, err = mmft("-m", *words)
    assert code == 0 and {f: f.stat().st_mtime_ns for f in folder.glob("*/summary.json")} == before


def test_successive_halving_keeps_the_better_ones(tmp_path):
    """Optuna's own pruner gets the reports of each point: of 9 points the better third passes the first rung."""
    import optuna
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from mmft.common.errors import Pruned
    from mmft.sweeps.optuna_study import Search, TrialOfPoint

    space = OverridesParser.create().parse_overrides(["trainer.learning_rate=interval(0,1)"])
    options = {"min_resource": 1, "reduction_factor": 3}
    search = Search(tmp_path, "cider", space, n_trials=9, seed=0, pruner="SuccessiveHalvingPruner", pruner_options=options)

    class Point:
        def __init__(self, words):
            self.name, self.value = words[0], float(words[0].split("=")[1])

    lengths = {}

    def train(points):
        (point,) = points
        reporter = TrialOfPoint(tmp_path / point.name, "cider")
        for step in range(1, 10):
            lengths[point.value] = step
            try:
                reporter.report(step, {"eval_cider": point.value})
            except Pruned:
                return [{"run": point.name, "status": "pruned", "objective": None}]
        return [{"run": point.name, "status": "finished", "objective": point.value}]

    search.run(Point, train)
    assert search.study.direction is optuna.study.StudyDirection.MAXIMIZE
    states = [t.state.name for t in trials(tmp_path)]
    assert states.count("PRUNED") >= 3 and states.count("COMPLETE") >= 1
    assert lengths[max(lengths)] == 9  # the best point was never pruned


@pytest.mark.parametrize(("words", "expected"), [
    (["lora.r=4"], "nothing to search"),
    (["lora.r=choice(2,4)", "hydra.sweeper.sampler=TPE"], "Did you mean TPESampler?"),
    (["lora.r=choice(2,4)", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0"),
    (["lora.r=choice(2,4)", "hydra.sweeper.sampler_options={startup:3}"], "hydra.sweeper.sampler_options"),
    (["lora.r=interval(0.5,4)"], "lora.r=0.5: must be int"),
    (["lora.r=choice(2,x)"], "lora.r=x: must be int"),
    (["lora.r=choice(2,4)", "hydra.sweep.dir=x"], "name=WORD names it"),
    (["lora.r=choice(2,4)", "hydra.sweeper.trials=3"], "trials"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(mmft, tmp_path, words, expected):
    code, _, err = mmft("-m", "hydra/sweeper=optuna", *words)
    assert code == 2 and expected in err and err.count("\n") == 1, err
    assert not (tmp_path / "outputs" / "sweeps").exists()


def test_without_optuna_one_line_says_what_to_install(mmft, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = mmft("-m", "hydra/sweeper=optuna", "lora.r=choice(2,4)")
    assert code == 2 and err == "mmft: hydra/sweeper=optuna needs Optuna: pip install mmft[sweep]\n"


@pytest.mark.parametrize("preset", ["search", "search_asha"])
def test_the_presets_say_what_is_searched(preset):
    from mmft.config import compose, sweep_overrides
    from mmft.sweeps.search import flat, interval_ends

    cfg = compose.compose_hydra([f"experiment={preset}"])
    space = dict(flat(to_plain(cfg.hydra.sweeper.params)))
    assert set(space) == {"lora.r", "trainer.learning_rate", "lora.lora_dropout", "lora.target_modules"}
    assert sweep_overrides.check_sweep(interval_ends([f"experiment={preset}", *(f"{k}={v}" for k, v in space.items())]), None, "config")[0]
