"""Training on a mix: the union equals one table, draws are exact however a run is trained, results of each source add up to the whole."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted import final, killed_after, rows, wait_for
from mixed import COLUMNS, HELD_OUT, mix, write_sources
from places import ROOT

WORDS = ["trainer.per_device_train_batch_size=4", "trainer.logging_steps=1", "lora.lora_dropout=0.2", "evaluation.base=false", "evaluation.samples=0",
         "generation.max_new_tokens=2", "logger=none"]  # fmt: skip
# 24 draws an epoch, 2 epochs of 6 steps: of caps 12 from 8 rows, of chat 4 from 8, of more 8 from 6
WEIGHTED = ["data.draws=24", "data.sources.caps.weight=1.5", "data.sources.chat.weight=0.5", "trainer.num_train_epochs=2"]
DRAWN = {"caps": 24, "chat": 8, "more": 16}
SOURCES = ("caps", "chat", "more")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def weighted(folder):
    """A run with checkpoints at every step, and losses measured after six of twelve."""
    from mmft.cli.main import main

    run = folder / "weighted"
    more = ["trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=20", "trainer.eval_strategy=steps", "trainer.eval_steps=6", "evaluation.generate=true"]
    assert main([*mix(folder, *SOURCES), *WEIGHTED, *WORDS, *more, f"output_dir={(folder / 'o').as_posix()}", f"run_dir={run.as_posix()}"]) == 0
    return run


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def drawn(run: Path) -> dict[str, int]:
    return {name: source["rows"] for name, source in summary(run)["sources"].items()}


def whole(run: Path) -> list[dict]:
    """metrics.jsonl without the clock and without the values of single sources."""
    return [{k: v for k, v in row.items() if "/" not in k} for row in rows(run)]


def test_the_union_equals_one_table_that_holds_both(mmft, tmp_path, folder):
    words = [*WORDS, "trainer.num_train_epochs=1", "trainer.eval_strategy=epoch"]
    code, _, err = mmft(*mix(folder, "caps", "more"), *words, f"run_dir={(tmp_path / 'mix').as_posix()}")
    assert code == 0, err[-2000:]
    table = ["data=table", f"data.path={(folder / 'both.csv').as_posix()}", f"data.columns={COLUMNS}"]
    code, _, err = mmft(*table, *words, f"run_dir={(tmp_path / 'table').as_posix()}")
    assert code == 0, err[-2000:]
    assert whole(tmp_path / "mix") == whole(tmp_path / "table") and final(tmp_path / "mix") == final(tmp_path / "table"), "to the bit"
    assert drawn(tmp_path / "mix") == {"caps": 8, "more": 6}
    one, other = summary(tmp_path / "mix"), summary(tmp_path / "table")
    assert one["eval_loss"] == other["eval_loss"] and {k: v for k, v in one["metrics"].items() if "/" not in k} == other["metrics"]


def test_losses_of_the_sources_add_up_and_every_metric_has_its_source(weighted):
    logged = [row for row in rows(weighted) if "loss" in row]
    assert len(logged) == 12
    for row in logged:
        tokens = {s: row.get(f"tokens/{s}", 0) for s in SOURCES}
        parts = sum(tokens[s] * row[f"loss/{s}"] for s in SOURCES if tokens[s])
        assert parts / sum(tokens.values()) == pytest.approx(row["loss"], rel=1e-4)
    sources = summary(weighted)["sources"]
    assert {s: sum(row.get(f"tokens/{s}", 0) for row in logged) for s in SOURCES} == {s: sources[s]["tokens"] for s in SOURCES}
    assert sum(source["tokens"] for source in sources.values()) == summary(weighted)["supervised_tokens"]
    assert drawn(weighted) == DRAWN and {s: sources[s]["draws"] for s in SOURCES} == {"caps": 12, "chat": 4, "more": 8}
    assert {s: sources[s]["held_out"] for s in SOURCES} == HELD_OUT and sources["more"]["weight"] is None

    answers = [json.loads(line) for line in (weighted / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = summary(weighted)["metrics"]
    for name in ("exact_match", "token_f1", "rouge_l"):
        for source in SOURCES:
            own = [row["metrics"][name] for row in answers if row["id"].startswith(f"{source}/")]
            assert len(own) == HELD_OUT[source] and metrics[f"{name}/{source}"] == pytest.approx(sum(own) / len(own))
        assert metrics[name] == pytest.approx(sum(HELD_OUT[s] * metrics[f"{name}/{s}"] for s in SOURCES) / sum(HELD_OUT.values()))
    measured = [row for row in rows(weighted) if "eval_loss" in row]
    assert [row["step"] for row in measured] == [6, 12] and all(f"eval_{n}/{s}" in row for row in measured for n in ("loss", "bleu4") for s in SOURCES)
    assert all(measured[-1][f"eval_loss/{s}"] == metrics[f"loss/{s}"] for s in SOURCES)


def test_the_held_out_loss_of_a_source_is_that_of_its_rows_alone(mmft, weighted, folder):
    """Measured again by `evaluate`, on a mix of one source; the mean over all tokens lies between those of the sources."""
    code, _, err = mmft("evaluate", f"run={weighted.as_posix()}", *mix(folder, "chat"))
    assert code == 0, err[-2000:]
    (written,) = (weighted / "eval").glob("mix_validation_*.json")
    alone = json.loads(written.read_text(encoding="utf-8"))
    metrics = summary(weighted)["metrics"]
    assert alone["rows"] == 2 and alone["eval_loss"] == pytest.approx(metrics["loss/chat"], abs=1e-5) and alone["metrics"]["cider/chat"] == alone["metrics"]["cider"]
    losses = [metrics[f"loss/{s}"] for s in SOURCES]
    assert min(losses) < summary(weighted)["eval_loss"] < max(losses)


def test_reports_show_every_source(weighted):
    for name in ("report.html", "report.md"):
        text = (weighted / name).read_text(encoding="utf-8")
        assert "By source" in text and "Draws an epoch" in text and all(s in text for s in SOURCES)
        assert f"{summary(weighted)['metrics']['loss/chat']:.3f}" in text
    card = (weighted / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "source chat: `messages`, 8 rows trained" in card and "| Exact match |" in card


@pytest.mark.parametrize("step", [4, 6])  # in the middle of the first epoch and at its end
def test_a_killed_run_draws_the_same_rows(mmft, tmp_path, weighted, step):
    run = killed_after(weighted, step, tmp_path / "run")
    code, out, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0 and f"from step {step}" in out, err[-2000:]
    assert final(run) == final(weighted) and rows(run) == rows(weighted) and summary(run)["sources"] == summary(weighted)["sources"]


@pytest.mark.long
def test_data_workers_and_a_real_sigkill_change_nothing(mmft, tmp_path, folder):
    words = [*mix(folder, *SOURCES), *WEIGHTED, *WORDS, "vision_cache=off", "trainer.save_strategy=steps", "trainer.save_steps=2", "evaluation.split=null",
             f"output_dir={(folder / 'o').as_posix()}"]  # fmt: skip
    for workers in (0, 2):
        code, _, err = mmft(*words, f"trainer.dataloader_num_workers={workers}", f"run_dir={(tmp_path / str(workers)).as_posix()}", output_dir=False)
        assert code == 0, err[-2000:]
    one, two = tmp_path / "0", tmp_path / "2"
    assert final(one) == final(two) and rows(one) == rows(two) and drawn(one) == drawn(two) == DRAWN
    killed = [*words, "trainer.dataloader_num_workers=2", f"run_dir={(tmp_path / 'killed').as_posix()}"]
    process = subprocess.Popen([sys.executable, "-m", "mmft", *killed], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(3):
        wait_for(tmp_path / "killed" / "checkpoints" / "checkpoint-4", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "DONE").exists()
    code, out, err = mmft("resume", f"run={(tmp_path / 'killed').as_posix()}", output_dir=False)
    assert code == 0 and "from step" in out, err[-2000:]
    assert final(tmp_path / "killed") == final(one) and rows(tmp_path / "killed") == rows(one) and drawn(tmp_path / "killed") == DRAWN


def points(folder: Path) -> dict[str, Path]:
    return {p.name: p for p in folder.glob("sweeps/*/*") if (p / "snapshot.yaml").is_file()}


def test_points_that_are_trained_together_draw_as_alone(mmft, tmp_path, folder, weighted):
    words = [*mix(folder, *SOURCES), *WEIGHTED, *WORDS, f"output_dir={(tmp_path / 'o').as_posix()}"]
    code, out, err = mmft("-m", "lora.r=4,16", *words, "name=two", output_dir=False)
    assert code == 0 and "2 points in step" in out, err[-2000:]
    found = points(tmp_path / "o")
    assert len(found) == 2 and all(summary(run)["sources"] == summary(weighted)["sources"] for run in found.values())
    alone, joint = ([row for row in rows(run) if "loss" in row] for run in (weighted, found["lora.r-16"]))
    for a, b in zip(alone, joint, strict=True):
        assert {k for k in a if "/" in k} == {k for k in b if "/" in k}
        assert all(b[key] == pytest.approx(a[key], abs=1e-4) for key in a if "/" in key or key == "loss")


def test_weights_are_swept_in_one_pass_and_the_leaderboard_plots_them(mmft, tmp_path, folder, monkeypatch):
    from mmft.common.errors import UserError
    from mmft.data import mix as mixes

    def mixing(sizes, weights, draws, plain=mixes.mixing):
        if weights.get("chat") == 7:
            raise UserError("no draws for 7")
        return plain(sizes, weights, draws)

    monkeypatch.setattr(mixes, "mixing", mixing)
    words = [*mix(folder, "caps", "chat"), "data.draws=8", "trainer.max_steps=4", *WORDS, "rank_by=loss/chat", f"output_dir={(tmp_path / 'o').as_posix()}"]
    # the last point fails after the others have begun and before it has an Accelerator, which all of a process share
    code, out, err = mmft("-m", "data.sources.chat.weight=0,0.25,3,7", *words, "name=weights", output_dir=False)
    assert code == 1 and "4 points in step" in out and len(err.strip().splitlines()) == 1 and "no draws for 7" in err, err[-2000:]
    found = {name: run for name, run in points(tmp_path / "o").items() if summary(run)["status"] == "finished"}
    assert {name.rpartition("-")[2]: drawn(run) for name, run in found.items()} == {
        "0": {"caps": 16, "chat": 0}, "0.25": {"caps": 12, "chat": 4}, "3": {"caps": 4, "chat": 12},
    }  # fmt: skip
    board = tmp_path / "o" / "sweeps" / "weights"
    page = (board / "report.html").read_text(encoding="utf-8")
    assert "Held-out loss, chat against data.sources.chat.weight" in page and "not on equal terms" not in page
    table = list(csv.DictReader((board / "leaderboard.csv").read_text(encoding="utf-8").splitlines()))
    losses = [float(row["loss/chat"]) for row in table if row["loss/chat"]]
    assert len(losses) == 3 and losses == sorted(losses) and {"loss/caps", "exact_match/caps", "exact_match/chat"} <= set(table[0])
    assert len({row["data.sources.chat.weight"] for row in table}) == 4


def test_the_checkpoint_that_is_best_for_one_source(mmft, tmp_path, folder):
    best = ["trainer.metric_for_best_model=loss/chat", "trainer.load_best_model_at_end=true", "trainer.eval_strategy=steps", "trainer.eval_steps=2",
            "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.max_steps=6", "trainer.learning_rate=0.02"]  # fmt: skip
    code, _, err = mmft(*mix(folder, "caps", "chat"), "data.sources.chat.weight=0", *WORDS, *best, f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 0, err[-2000:]
    losses = {row["step"]: row["eval_loss/chat"] for row in rows(tmp_path / "run") if "eval_loss/chat" in row}
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_global_step"] == min(losses, key=losses.get) and state["best_metric"] == pytest.approx(min(losses.values()))


def test_rows_that_are_too_long_are_dropped_in_the_source_that_allows_it(mmft, tmp_path, folder):
    words = [*mix(folder, "caps", "chat"), *WORDS, "trainer.max_steps=1", "collator.max_length=20"]
    code, _, err = mmft(*words, "evaluation.split=null")
    assert code == 2 and "data.sources.caps.too_long=drop" in err and err.count("\n") == 1, err
    shutil.copy(folder / "chat.jsonl", tmp_path / "chat.jsonl")
    with (tmp_path / "chat.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "a very long answer " * 30}]}))
    words = [*mix(folder, "caps", "chat"), f"data.sources.chat.path={(tmp_path / 'chat.jsonl').as_posix()}", "data.sources.chat.splits.validation=0",
             "data.sources.chat.too_long=drop", *WORDS, "trainer.max_steps=1", "collator.max_length=120", f"run_dir={(tmp_path / 'run').as_posix()}"]  # fmt: skip
    code, out, err = mmft(*words)
    assert code == 0 and "1 of 11 rows of chat, train are longer" in out, err
    (dropped,) = (json.loads(line) for line in (tmp_path / "run" / "dropped_rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert dropped["id"] == "chat/11" and summary(tmp_path / "run")["sources"]["chat"]["training_rows"] == 10


def test_a_metric_that_only_one_source_supports_is_named_once(mmft, tmp_path, folder):
    code, out, err = mmft(*mix(folder, "caps", "chat"), *WORDS, "metrics=[exact_match,number]", "trainer.max_steps=1", f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 0, err
    lines = [line for line in out.splitlines() if "number leaves out" in line]
    assert len(lines) == 1 and "3 of 5 rows (all of caps)" in lines[0]
    metrics = summary(tmp_path / "run")["metrics"]
    assert {"exact_match/caps", "exact_match/chat"} <= set(metrics) and any(k.startswith("number") and k.endswith("/chat") for k in metrics)
    assert not any(k.startswith("number") and k.endswith("/caps") for k in metrics)


@pytest.mark.parametrize("words, message", [
    (["data.sources.chat.weight=2", "trainer.train_sampling_strategy=sequential"], "trainer.train_sampling_strategy=sequential: rows that are drawn by weight"),
    (["rank_by=loss/chta"], "rank_by=loss/chta: no such metric. Did you mean loss/chat?"),
    (["trainer.metric_for_best_model=cider/chat", "trainer.eval_strategy=epoch"], "cider/chat is measured while training only with evaluation.generate=true"),
])  # fmt: skip
def test_what_is_refused_before_training(mmft, folder, words, message):
    code, _, err = mmft(*mix(folder, "caps", "chat"), *words)
    assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.long
def test_length_groups_of_a_mix_draw_the_same_rows(mmft, tmp_path, folder):
    run = tmp_path / "run"
    code, _, err = mmft(*mix(folder, *SOURCES), *WEIGHTED, *WORDS, "trainer.train_sampling_strategy=group_by_length", "evaluation.split=null", f"run_dir={run.as_posix()}")
    assert code == 0 and drawn(run) == DRAWN, err[-2000:]


@pytest.mark.long
def test_two_processes_draw_what_one_draws(mmft, tmp_path, folder):
    from test_distributed import torchrun

    words = [*mix(folder, *SOURCES), *WEIGHTED, *WORDS[1:], "lora.lora_dropout=0", "model.device=cpu"]
    code, _, err = mmft(*words, "trainer.per_device_train_batch_size=4", f"run_dir={(tmp_path / 'one').as_posix()}")
    assert code == 0, err[-2000:]
    done = torchrun(tmp_path / "outputs", *words, "trainer.per_device_train_batch_size=2", f"run_dir={(tmp_path / 'two').as_posix()}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path / "one")["sources"] == summary(tmp_path / "two")["sources"] and drawn(tmp_path / "two") == DRAWN
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and all(b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4) for key in a if "/" in key)


@pytest.mark.parametrize("cache", ["auto", pytest.param("off", marks=pytest.mark.long)])
@pytest.mark.long
def test_a_step_with_images_for_one_point_and_without_for_another(mmft, tmp_path, folder, cache):
    """Batches of one row: the two seeds draw rows with and without images at different steps."""
    words = [*mix(folder, "caps", "chat"), *WORDS[1:], "trainer.per_device_train_batch_size=1", "trainer.max_steps=8", "evaluation.split=null", f"vision_cache={cache}"]
    code, out, err = mmft("-m", "seed=1,2", *words, f"output_dir={(tmp_path / 'o').as_posix()}", output_dir=False)
    assert code == 0 and "2 points in step" in out, err[-2000:]
    code, _, err = mmft("seed=2", *words, f"run_dir={(tmp_path / 'alone').as_posix()}")
    assert code == 0, err[-2000:]
    kinds = {}
    for name, run in points(tmp_path / "o").items():
        kinds[name] = ["caps" if "loss/caps" in row else "chat" for row in rows(run) if "loss" in row]
    assert len(kinds["seed-1"]) == 8 and any(a != b for a, b in zip(kinds["seed-1"], kinds["seed-2"], strict=True))
    joint, alone = ([row["loss"] for row in rows(run) if "loss" in row] for run in (points(tmp_path / "o")["seed-2"], tmp_path / "alone"))
    assert joint == pytest.approx(alone, abs=1e-4)
