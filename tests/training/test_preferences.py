"""Training with preference objectives through the command line: results, resume, the reference's cache, rows that are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compared import draw, labels, pairs
from interrupted import assert_resumes, final, rows
from safetensors.torch import load_file

SAVING = ["trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=10", "lora.lora_dropout=0.2"]
SCORES = ("reward_accuracy", "reward_margin", "preference_loss", "kl")
OF_PAIRS = ("dpo", "ipo", "simpo", "orpo", "mpo")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


def train(words, folder, name="run"):
    """The run directory of a training."""
    from mmft.cli.main import main

    assert main([*words, f"output_dir={(folder / 'o').as_posix()}", f"run_dir={(folder / name).as_posix()}"]) == 0
    return folder / name


def summary(run):
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(drawn, tmp_path_factory):
    """A finished run of each objective, trained at its first use."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in made:
            data = labels(drawn, *SAVING) if name == "kto" else pairs(drawn, *SAVING)
            initial = [f"lora.init_lora_weights={name}"] if name in ("pissa", "olora") else []
            made[name] = train([f"objective={'dpo' if initial else name}", *initial, *data, "trainer.eval_strategy=steps", "trainer.eval_steps=3"], folder, name)
        return made[name]

    return run


def check_resume(mmft, run, tmp_path, step):
    copy = assert_resumes(mmft, run, step, tmp_path / "run")
    one, other = summary(run), summary(copy)
    for key in ("steps", "supervised_tokens", "eval_loss", "metrics", "base_metrics", "train_loss"):
        assert one[key] == other[key], key


@pytest.mark.parametrize("name", ["dpo", "kto", *(pytest.param(n, marks=pytest.mark.long) for n in OF_PAIRS[1:])])
def test_a_resumed_run_ends_with_the_same_bytes(mmft, runs, tmp_path, name):
    run = runs(name)
    if name != "kto":
        shutil.rmtree(run.parent / "o" / "cache", ignore_errors=True)  # the reference is computed again, to the same bits
    check_resume(mmft, run, tmp_path, 3)


def test_what_a_dpo_run_measures_and_logs(runs):
    run = runs("dpo")
    result = summary(run)
    assert result["base_metrics"].items() >= {"reward_accuracy": 0.5, "reward_margin": 0.0, "kl": 0.0}.items(), "the base is its own reference"
    assert result["base_metrics"]["preference_loss"] == pytest.approx(0.6931472, abs=1e-6), "-log sigmoid(0)"
    assert result["metrics"]["kl"] > 0.001 and result["metrics"]["reward_margin"] != 0
    logged = rows(run)
    evaluations = [row for row in logged if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6] and all(f"eval_{score}" in row for row in evaluations for score in SCORES)
    for score in SCORES:
        assert evaluations[-1][f"eval_{score}"] == pytest.approx(result["metrics"][score], rel=1e-6), score
        assert result["metric_info"][score]["higher_is_better"] is (score in ("reward_accuracy", "reward_margin"))
    steps = [row for row in logged if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and {"reward_margin", "reward_accuracy"} <= steps[-1].keys()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Reward accuracy" in page and "KL to the reference" in page


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.long) for n in OF_PAIRS[1:]), "kto"])
def test_every_objective_trains_and_measures(runs, name):
    result = summary(runs(name))
    assert set(SCORES) <= result["metrics"].keys() and result["steps"] == 6
    assert max(float(w.abs().max()) for k, w in load_file(runs(name) / "adapter" / "adapter_model.safetensors").items() if "lora_B" in k) > 1e-3
    if name == "kto":
        assert result["base_metrics"]["reward_accuracy"] == 0.5


@pytest.mark.parametrize("name", ["dpo", "pissa", pytest.param("olora", marks=pytest.mark.long)])
def test_the_scores_of_a_run_are_those_of_plain_transformers(runs, drawn, name):
    """The saved adapter under plain peft, whole logits, one answer after another, over the held-out rows of the run.

    Of PiSSA and OLoRA, which change the base weights while they are trained, the saved adapter sits on the original base, which is the reference.
    """
    from mmft.collators.answers import AnswerCollator
    from mmft.config.compose import compose
    from mmft.data.prepared import PreparedData
    from mmft.runs.open import open_run

    run = runs(name)
    opened = open_run(run, compose(["task=evaluate", f"task.run={run.as_posix()}"]), [])
    env = json.loads((run / "env.json").read_text(encoding="utf-8"))
    held_out = PreparedData(env["data"]["path"]).split("validation")
    collator = AnswerCollator(opened.collator)

    def token_log_probs(batch):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
        logits = opened.model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
        return [logits[i - 1] for i in range(1, logits.shape[0]) if batch["labels"][0, i] != -100], [int(t) for t in batch["labels"][0] if t != -100]

    margins, divergence = [], []
    with torch.no_grad():
        for row in held_out:
            ratios = []
            for answer, kind in collator.answers(row):
                batch = opened.collator([answer])
                own, targets = token_log_probs(batch)
                with opened.model.disable_adapter():
                    reference, _ = token_log_probs(batch)
                ratios.append(sum(float(p[t] - q[t]) for p, q, t in zip(own, reference, targets)))
                divergence += [float((p.exp() * (p - q)).sum()) for p, q in zip(own, reference)] if kind else []
            margins.append(0.1 * (ratios[0] - ratios[1]))
    metrics = summary(run)["metrics"]
    assert metrics["reward_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert metrics["reward_accuracy"] == sum(m > 0 for m in margins) / len(margins)
    assert metrics["kl"] == pytest.approx(sum(divergence) / len(divergence), abs=1e-5) and metrics["kl"] > 1e-4
    assert summary(run)["base_metrics"]["kl"] == 0.0 and all("eval_kl" in row for row in rows(run) if "eval_loss" in row)


@pytest.mark.long
def test_evaluate_measures_preferences_on_any_rows(mmft, runs, drawn):
    """On the run's own rows the same scores as training measured; on rows that are no pairs it says why there are none."""
    for name in ("dpo", "kto"):
        run = runs(name)
        code, _, err = mmft("evaluate", f"run={run.as_posix()}", "base=true", "evaluation.max_samples=4", output_dir=False)
        assert code == 0, err
        [file] = (run / "eval").glob("table_validation_*.json")
        measured, trained = json.loads(file.read_text(encoding="utf-8")), summary(run)["metrics"]
        for score in SCORES:
            assert measured["metrics"][score] == pytest.approx(trained[score], abs=1e-5), (name, score)
        assert measured["base_metrics"]["reward_accuracy"] == 0.5 and measured["metric_info"]["kl"]["higher_is_better"] is False
    code, out, err = mmft("evaluate", f"run={runs('dpo').as_posix()}", *labels(drawn)[:3], "data.splits.validation=4", output_dir=False)
    assert code == 0 and "not measured: objective=dpo needs a rejected answer in every row" in out, err


@pytest.mark.long
def test_a_step_of_sgd_is_the_gradient_of_the_formula(drawn, tmp_path):
    """One step over one batch, and over the same pairs in four micro-batches: weights move by the same gradient."""
    words = ["objective=dpo", *pairs(drawn), "trainer.max_steps=1", "trainer.optim=sgd", "trainer.learning_rate=1.0", "trainer.lr_scheduler_type=constant",
             "trainer.max_grad_norm=0", "lora.lora_dropout=0", "trainer.train_sampling_strategy=sequential"]  # fmt: skip
    whole = load_file(train([*words, "trainer.per_device_train_batch_size=8"], tmp_path, "whole") / "adapter" / "adapter_model.safetensors")
    parts = [*words, "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4"]
    divided = load_file(train(parts, tmp_path, "divided") / "adapter" / "adapter_model.safetensors")
    moved = max(float(w.abs().max()) for k, w in whole.items() if "lora_B" in k)
    assert moved > 1e-3 and max(float((whole[k] - divided[k]).abs().max()) for k in whole) < 1e-5 * max(moved, 1)


def test_the_reference_is_computed_once_for_all_betas(mmft, drawn, tmp_path):
    words = [*pairs(drawn), "trainer.max_steps=1", "evaluation.base=false"]
    code, out, err = mmft("objective=dpo", *words)
    assert code == 0 and "log-probabilities of 48 answers under the base model, computed in" in out, err
    code, out, err = mmft("-m", "objective=dpo,ipo", "objective.beta=0.1", *words, "hydra/launcher=basic")
    assert code == 0 and out.count("log-probabilities of 48 answers under the base model, read from") == 1, err
    folders = list((tmp_path / "outputs" / "cache").glob("reference-*"))
    assert len(folders) == 1 and len(list(folders[0].glob("*.safetensors"))) == 1
    [pack] = folders[0].glob("*.safetensors")
    pack.write_bytes(pack.read_bytes()[:-3])
    code, out, err = mmft("objective=ipo", *words)
    assert code == 0 and "is damaged" in out + err and "computed in" in out


def test_sources_of_a_mix_are_counted_in_pairs(drawn, tmp_path):
    """Two sources of the same pairs: their losses add up to the loss that is trained, their rows and tokens to those of the run."""
    words = pairs(drawn)
    mix = ["data=mix"]
    for s in "ab":
        mix += [f"data.sources.{s}=table", *(word.replace("data.", f"data.sources.{s}.", 1) for word in words[1:4])]
    assert "splits" in words[3]
    run = train(["objective=dpo", *mix, *words[4:], "trainer.logging_steps=1", "evaluation.base=false"], tmp_path)
    found, sources = summary(run), summary(run)["sources"]
    assert sum(s["rows"] for s in sources.values()) == found["steps"] * 4 and sum(s["tokens"] for s in sources.values()) == found["supervised_tokens"]
    steps = [row for row in rows(run) if "loss" in row]
    assert len(steps) == 6
    for row in steps:
        assert row.get("pairs/a", 0) + row.get("pairs/b", 0) == 4
        assert sum(row.get(f"loss/{s}", 0) * row.get(f"pairs/{s}", 0) for s in "ab") / 4 == pytest.approx(row["loss"], abs=1e-6)


def test_chosen_and_rejected_answers_share_the_features_of_their_image(mmft, drawn, monkeypatch):
    from mmft.feature_cache.image_features import FeatureLayout

    computed = []
    original = FeatureLayout.compute
    monkeypatch.setattr(FeatureLayout, "compute", lambda self, model, tensors, n: computed.append(n) or original(self, model, tensors, n))
    code, _, err = mmft("objective=dpo", *pairs(drawn), "trainer.max_steps=2", "evaluation.base=false")
    assert code == 0, err
    assert sum(computed) == 24, "24 images, each computed once for both of its answers"


REFUSED = [
    (["objective=dpo"], labels, "objective=dpo: table: 20 of 20 rows of train have no rejected answer, e.g. "),
    (["objective=kto", "data.columns.label=null"], labels, "rows of train have no rejected answer and no label, e.g. "),
    (["objective=dpo", "augment.RandomRotation.degrees=5"], pairs, "objective=dpo: compares answers to one and the same image, and augment.RandomRotation"),
    (["objective=simpo", "trainer.label_smoothing_factor=0.1"], pairs, "objective=simpo: trainer.label_smoothing_factor smooths the cross entropy"),
    (["objective=dpo", "trainer.fold_accumulation=always"], pairs, "objective=dpo: computes each micro-batch by itself, so trainer.fold_accumulation=always cannot be"),
    (["objective=dpo", "objective.beta=0"], pairs, "objective.beta=0: must be above 0"),
    (["objective=dpo", "objective.gamma=1"], pairs, "objective.gamma: no such key"),
    (["objective=dpoo"], pairs, "objective=dpoo: no such objective. Did you mean dpo?"),
    (["rank_by=reward_accuracy"], pairs, "rank_by=reward_accuracy: no such metric"),
]


@pytest.mark.parametrize("words, data, message", REFUSED, ids=[" ".join(words) for words, _, _ in REFUSED])
def test_what_cannot_be_trained_is_refused_in_one_line(mmft, drawn, words, data, message):
    code, out, err = mmft(*data(drawn), *words)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert "step 1/" not in out


def test_the_audit_shows_and_counts_every_answer(mmft, drawn):
    """Two sequences a row, and a batch of 4 rows is 8 of them; all rows have one length here but for the words of their answers."""
    code, out, err = mmft("audit", "objective=dpo", *pairs(drawn)[:4], "trainer.per_device_train_batch_size=4", "rows=1", "generate=0", "count=null")
    assert code == 0, err
    assert "Tokens of 20 of 20 rows (40 sequences)" in out
    from mmft.config.compose import compose
    from mmft.data.prepare import prepared_data

    rows = prepared_data(compose([*pairs(drawn), f"output_dir={out.split('page ')[-1].strip().rpartition('/')[0]}"])).split("train")
    first = rows[0]
    assert f"[[{first.answer_text}<|im_end|>]]" in out and f"[[{first.rejected}<|im_end|>]]" in out
    [most] = [int(line.split("at most")[1].strip(" )\n")) for line in out.splitlines() if "tokens with padding" in line]
    [lengths] = [line.split() for line in out.splitlines() if line.startswith("tokens  ")]
    assert most == 8 * int(lengths[5]), "eight sequences as long as the longest"


def test_labels_of_one_kind_are_refused(mmft, drawn, tmp_path):
    rows = [json.loads(line) for line in (drawn / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["image"] = (drawn / row["image"]).as_posix()
    words = labels(tmp_path, f"data.root={drawn.as_posix()}")
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps({**row, "good": True}) for row in rows), encoding="utf-8")
    code, _, err = mmft("objective=kto", *words)
    assert code == 2 and "all 20 rows of train are labelled good; it learns from the difference to bad ones" in err
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps({**row, "good": False}) for row in rows), encoding="utf-8")
    code, _, err = mmft(*words)
    assert code == 2 and "objective=sft: all 20 rows of train are labelled bad (label=false); objective=kto learns from such answers" in err


def test_boxes_in_one_of_two_answers_are_refused(mmft, drawn, tmp_path):
    """The chosen answer would hold boxes as the model writes them, and the rejected one the words <bbox>."""
    found = [json.loads(line) for line in (drawn / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    made = [{**row, "chosen": "a square at <bbox>", "rejected": "a circle at <bbox>", "objects": {"bbox": [[1, 1, 20, 20]], "ref": ["square"]}} for row in found]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    code, _, err = mmft("objective=dpo", *pairs(tmp_path, f"data.root={drawn.as_posix()}", "data.columns.objects=objects"))
    assert code == 2 and "20 of 20 rows of train have boxes in the chosen answer, e.g. " in err and err.count("\n") == 1, err


def test_a_rejected_answer_that_is_too_long_is_named_or_left_out(mmft, drawn, tmp_path):
    rows = [json.loads(line) for line in (drawn / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[3]["rejected"] = "red square " * 60
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = [*pairs(tmp_path, f"data.root={drawn.as_posix()}", "collator.max_length=100"), "data.splits={validation: 4, by: last}", "trainer.max_steps=1"]
    code, _, err = mmft("objective=dpo", *words)
    assert code == 2 and "1 of 20 rows are longer than collator.max_length=100: 4 (" in err
    code, out, err = mmft("objective=dpo", *words, "data.too_long=drop")
    assert code == 0 and "1 of 20 rows of train are longer" in out, err


def test_supervised_training_leaves_bad_answers_out(mmft, drawn, tmp_path):
    code, out, err = mmft(*labels(drawn), "trainer.max_steps=1", f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 0, err
    left = [line for line in out.splitlines() if line.startswith("left out")]
    assert len(left) == 2 and "of 20 rows of train are labelled bad" in left[0] and "of 4 rows of validation" in left[1]
    good = {f"{n}.png" for n in range(24) if n % 2}
    answers = [json.loads(line) for line in (tmp_path / "run" / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < len(answers) < 4 and {image for row in answers for image in row["images"]} <= good


@pytest.mark.long
def test_supervised_training_is_the_same_with_a_rejected_column(mmft, drawn, tmp_path):
    """The chosen answers alone are trained: the same bytes as from a table without the other column."""
    one = train([*pairs(drawn), "trainer.max_steps=2", "evaluation.split=null"], tmp_path, "with")
    other = train([*pairs(drawn), "data.columns.rejected=null", "trainer.max_steps=2", "evaluation.split=null"], tmp_path, "without")
    assert final(one) == final(other)


def test_the_former_name_of_the_ranking_key_still_works(mmft, drawn, tmp_path):
    """In words, in a yaml file, in the snapshot of an older run; together with an objective it is refused by name."""
    from mmft.config.compose import compose
    from mmft.config.identity import config_identity

    assert compose(["objective=exact_match"]).rank_by == "exact_match" and compose(["objective=exact_match"]).objective == compose([]).objective
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "old.yaml").write_text("# @package _global_\nobjective: exact_match\n", encoding="utf-8")
    cfg = compose(["experiment=old"], str(tmp_path / "conf"))
    assert cfg.rank_by == "exact_match" and config_identity(cfg) == config_identity(compose([]))
    code, _, err = mmft("--config-dir", str(tmp_path / "conf"), "experiment=old", "objective=dpo")
    assert code == 2 and "write rank_by: exact_match there" in err
    assert config_identity(compose(["objective=dpo"])) != config_identity(compose([])) != config_identity(compose(["objective=dpo", "objective.beta=0.2"]))


@pytest.fixture(scope="module")
def chain(drawn, tmp_path_factory):
    """A supervised run, and a DPO run that goes on from it."""
    folder = tmp_path_factory.mktemp("chain")
    first = train([*pairs(drawn), "trainer.max_steps=4"], folder, "first")
    return first, train(["objective=dpo", *pairs(drawn), f"lora.start={first.as_posix()}", "trainer.eval_strategy=steps", "trainer.eval_steps=6"], folder, "second")


def test_the_adapter_that_a_run_starts_from_is_its_reference(mmft, chain):
    """Scores by plain peft: the start and the tuned adapter one after another on the base, whole logits, answer by answer."""
    from mmft.collators.answers import AnswerCollator
    from mmft.config.compose import compose
    from mmft.data.prepared import PreparedData
    from mmft.runs.open import open_run

    first, second = chain
    held_out = PreparedData(json.loads((second / "env.json").read_text(encoding="utf-8"))["data"]["path"]).split("validation")

    def answers(run):
        opened = open_run(run, compose(["task=evaluate", f"task.run={run.as_posix()}"]), [])
        for row in held_out:
            for answer, kind in AnswerCollator(opened.collator).answers(row):
                batch = opened.collator([answer])
                with torch.no_grad():
                    logits = opened.model(**{k: v for k, v in batch.items() if k not in ("labels", "row_ids")}, use_cache=False).logits[0].float().log_softmax(-1)
                places = [i for i in range(1, len(logits)) if batch["labels"][0, i] != -100]
                yield kind, logits[[i - 1 for i in places]], batch["labels"][0, places]

    ratios, divergence = [], []
    for (kind, own, targets), (_, before, _) in zip(answers(second), answers(first), strict=True):
        ratios.append(float((own - before).gather(1, targets[:, None]).sum()))
        divergence += (own.exp() * (own - before)).sum(-1).tolist() if kind else []
    margins = [0.1 * (a - b) for a, b in zip(ratios[0::2], ratios[1::2])]
    measured = summary(second)["metrics"]
    assert measured["reward_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert measured["kl"] == pytest.approx(sum(divergence) / len(divergence), abs=1e-5) and measured["kl"] > 1e-4
    assert summary(second)["base_metrics"]["reward_accuracy"] == 0.5 and rows(second)[0]["loss"] == pytest.approx(0.6931472, abs=0.02)
    code, _, err = mmft("evaluate", f"run={second.as_posix()}", "evaluation.max_samples=4", output_dir=False)
    assert code == 0, err
    [file] = (second / "eval").glob("table_validation_*.json")
    again = json.loads(file.read_text(encoding="utf-8"))["metrics"]
    assert [again[score] for score in SCORES] == pytest.approx([measured[score] for score in SCORES], abs=1e-5)


def test_a_run_cannot_be_its_own_reference(mmft, drawn, chain, tmp_path):
    first, _ = chain
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    code, _, err = mmft("objective=dpo", *pairs(drawn), f"lora.start={copy.as_posix()}", f"run_dir={copy.as_posix()}", output_dir=False)
    assert code == 2 and "the run that is to be trained; it cannot be its own start, nor the reference of its objective" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.long
def test_a_reference_that_is_gone_is_named(mmft, chain, tmp_path):
    first, second = chain
    shutil.copytree(second, tmp_path / "second")
    env = json.loads((tmp_path / "second" / "env.json").read_text(encoding="utf-8"))
    [start] = env["parents"]
    start["path"] = (tmp_path / "gone").as_posix()
    (tmp_path / "second" / "env.json").write_text(json.dumps(env), encoding="utf-8")
    code, out, err = mmft("evaluate", f"run={(tmp_path / 'second').as_posix()}", "evaluation.max_samples=4", output_dir=False)
    assert code == 0 and "which is missing or not readable" in out and "the reference model cannot be had any more" in out, err
