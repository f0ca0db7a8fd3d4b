"""objective=grpo: equal to plain TRL, resumed to the byte, rewards by hand, what is refused and how."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from interrupted import assert_resumes, rows
from places import ROOT
from safetensors.torch import load_file
from small_models import GROUP, KINDS

pytest.importorskip("trl", reason="needs the extra rl: pip install 'mmft[rl]'")

SCENES = ["data=scenes", "data.pictures=40", "data.captions=0", "data.turns=1", "data.seed=5", "data.splits.validation=8", "evaluation.base=false", "evaluation.samples=0",
          "logger=none", "metrics=[exact_match]", "generation.max_new_tokens=6", "lora.lora_dropout=0"]  # fmt: skip
GRPO = ["objective=grpo", "objective.num_generations=4", "trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=2", "trainer.logging_steps=1",
        "trainer.learning_rate=0.003"]  # fmt: skip


def train(folder, name, *words, code=0):
    from mmft.cli.main import main

    run = folder / name
    own = [] if "objective=sft" in words else GRPO
    scenes = [word for word in SCENES if "lora=none" not in words or not word.startswith("lora.")]
    assert main([*scenes, *own, *words, f"output_dir={(folder / 'o').as_posix()}", f"run_dir={run.as_posix()}"]) == code
    return run


def summary(run):
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


# six steps, two from each batch of answers, with a KL divergence; every step is saved
SIX = ["trainer.max_steps=6", "objective.num_iterations=2", "objective.beta=0.05", "model.rewrites=off", "trainer.save_strategy=steps", "trainer.save_steps=1",
       "trainer.save_total_limit=10"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grpo")


@pytest.fixture(scope="module")
def run(folder):
    return train(folder, "run", *SIX)


@pytest.mark.long
def test_a_run_equals_plain_trl(folder, tmp_path):
    """TRL's own rendering by the processor, peft's own loading, an exact match written here: the same weights and logs after six steps.

    Both go on with the adapter of a supervised step.
    """
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    from mmft.data.prepared import PreparedData

    first = train(folder, "first", "objective=sft", "trainer.max_steps=1")
    run = train(folder, "second", *SIX, f"lora.start={first.as_posix()}")
    env = json.loads((run / "env.json").read_text(encoding="utf-8"))
    data = PreparedData(env["data"]["path"]).split("train")
    samples = [data[i] for i in range(len(data))]
    processor = AutoProcessor.from_pretrained(first / "adapter", padding_side="left")
    processor.tokenizer.padding_side = "left"  # TRL pads prompts on the left, and takes token types as the processor pads them
    config = json.loads((first / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    model = Qwen2VLForConditionalGeneration.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, first / "adapter", is_trainable=True)
    ends = json.loads((first / "adapter" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    model.generation_config.eos_token_id = ends

    def exact(completions, answer, **_):
        return [float(completion[0]["content"].strip() == text) for completion, text in zip(completions, answer)]

    dataset = Dataset.from_dict({"number": list(range(len(samples)))})
    dataset = dataset.map(lambda row: {"answer": samples[row["number"]].references[0]})
    dataset.set_transform(lambda batch: {
        "prompt": [[{"role": "user", "content": samples[n].prompt_text}] for n in batch["number"]], "images": [samples[n].load_images() for n in batch["number"]],
        "answer": [samples[n].references[0] for n in batch["number"]],
    })  # fmt: skip
    args = GRPOConfig(
        output_dir=str(tmp_path / "trl"), seed=42, data_seed=42, max_steps=6, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=4, num_iterations=2,
        beta=0.05, max_completion_length=6, learning_rate=0.003, lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
        bf16=False, gradient_checkpointing=False, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_dropout=True, disable_tqdm=True,
        generation_kwargs={"eos_token_id": ends},
    )  # fmt: skip
    trainer = GRPOTrainer(model, reward_funcs=exact, args=args, train_dataset=dataset, processing_class=processor)
    trainer.train()
    logged = [row for row in rows(run) if "reward" in row]
    plain = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == len(plain) == 3 and any(row["reward"] > 0 for row in plain), "answers are sampled for two steps at once"
    for one, other in zip(logged, plain):
        assert one["reward"] == one["rewards/exact_match/mean"] == pytest.approx(other["reward"], abs=1e-6)
        for key in ("reward_std", "kl", "entropy", "completions/mean_length", "grad_norm", "learning_rate"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    theirs = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".default." in name}
    assert set(ours) == set(theirs)
    before = load_file(first / "adapter" / "adapter_model.safetensors")
    for name, weight in ours.items():
        moved = float((weight - before[name]).abs().max())
        assert float((weight - theirs[name].detach()).abs().max()) <= 1e-5 * max(moved, 1e-3), name
    assert max(float((w - before[n]).abs().max()) for n, w in ours.items()) > 1e-3, "the weights have moved"
    assert "ref" not in {path.name for path in (run / "adapter").iterdir()}


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.long)])
def test_a_resumed_run_ends_with_the_same_bytes(mmft, run, tmp_path, step):
    """Step 3 lies between the two updates from the same answers; 4 x 4 prompts of 32 rows are in the middle of an epoch."""
    copy = assert_resumes(mmft, run, step, tmp_path / "run")
    assert summary(copy)["metrics"] == summary(run)["metrics"] and summary(copy)["reward"] == summary(run)["reward"]


def test_what_a_run_records(run):
    result, env = summary(run), json.loads((run / "env.json").read_text(encoding="utf-8"))
    assert env["packages"]["trl"] and result["reward"].keys() == {"first", "last"} and result["supervised_tokens"] > 0
    assert result["effective_batch_size"] == 16 and result["steps"] == 6
    assert (run / "report.html").is_file() and (run / "loss_curve.png").is_file()
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and not list((run / "adapter").glob("*/"))


def test_the_reference_of_an_initialisation_that_changes_the_base_is_the_model_as_it_was(folder, mmft):
    """PiSSA and a KL divergence: 0 at the first step, and the saved adapter over the original base is the model that was trained."""
    run = train(folder, "pissa", "lora.init_lora_weights=pissa", "objective.beta=0.1", "trainer.max_steps=2", "objective.num_iterations=2", "trainer.warmup_steps=0")
    logged = [row for row in rows(run) if "kl" in row]
    assert abs(logged[0]["kl"]) < 1e-7 < 1e-6 < logged[1]["kl"], "the second update of the same answers is away from the reference"
    code, _, err = mmft("evaluate", f"run={run.as_posix()}", output_dir=False)
    assert code == 0, err
    [file] = (run / "eval").glob("scenes_validation_*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["eval_loss"] == pytest.approx(summary(run)["eval_loss"], abs=1e-4)


def test_a_metric_that_fails_ends_the_run_with_its_name_row_and_answer(mmft, monkeypatch):
    from mmft.evaluation.metrics.answers import ExactMatch

    monkeypatch.setattr(ExactMatch, "row", lambda self, record: {"exact_match": math.nan})
    code, _, err = mmft(*SCENES, *GRPO, "trainer.max_steps=1", "audit=false")
    assert code == 2 and err.count("\n") == 1 and "is nan, not a finite number" in err, err
    assert "objective.reward_funcs: exact_match (metrics.exact_match) of row scene-0000" in err and "the answer" in err, err


@pytest.mark.parametrize("words, expected", [
    (["trainer.packing=true"], "trainer.packing=True does not apply"),
    (["trainer.tokens_per_batch=512"], "trainer.tokens_per_batch=512 does not apply"),
    (["trainer.label_smoothing_factor=0.1"], "trainer.label_smoothing_factor=0.1 does not apply"),
    (["trainer.neftune_noise_alpha=5"], "trainer.neftune_noise_alpha=5 does not apply"),
    (["trainer.fold_accumulation=always"], "trainer.fold_accumulation=always does not apply"),
    (["trainer.train_sampling_strategy=group_by_length"], "objective.shuffle_dataset=false"),
    (["augment.ColorJitter.brightness=0.2"], "augment.ColorJitter does not apply"),
    (["vision_cache=memory"], "vision_cache=memory does not apply"),
    (["lora=none", "objective.beta=0.1"], "lora=none keeps no copy"),
    (["lora.bias=all", "objective.beta=0.1"], "lora.bias=all trains weights outside it"),
    (["objective.num_generations=3"], "8 x trainer.gradient_accumulation_steps=2 = 16 answers are sampled at once, which is no multiple"),
    (["trainer.per_device_train_batch_size=256"], "128 prompts are sampled at once, and there are 32 rows"),
    (["objective.reward_funcs=[exact_mach]"], "Did you mean exact_match?"),
    (["metrics=[bleu4]", "objective.reward_funcs=[bleu4]", "rank_by=eval_loss"], "has a value of all rows together"),
    (["metrics=[mean_iou]", "objective.reward_funcs=[mean_iou]", "rank_by=eval_loss"], "can have no reward: row scene-0000"),
    (["metrics=[exact_match,cider]", "objective.reward_funcs=[exact_match,exact_match]"], "each once"),
    (["objective.temperature=0"], "must be above 0"),
    (["objective.use_vllm=true"], "objective.use_vllm: no such key"),
])  # fmt: skip
def test_what_does_not_apply_is_refused_by_name(mmft, words, expected):
    code, _, err = mmft(*SCENES, *GRPO, *words)
    assert code == 2 and err.count("\n") == 1 and expected in err, err


def test_weights_that_are_not_finite_are_one_line(mmft):
    code, _, err = mmft(*SCENES, *GRPO, "trainer.max_steps=3", "trainer.warmup_steps=0", "trainer.learning_rate=1e30", "audit=false")
    assert code == 2 and err.count("\n") == 1 and "not finite" in err and "scene-0000" in err and "trainer.learning_rate" in err, err


def test_rows_with_a_loss_weight_are_refused():
    from mmft.common.errors import UserError
    from mmft.data.sample import Sample, assistant_turn, user_turn
    from mmft.evaluation.metrics.answers import ExactMatch
    from mmft.evaluation.metrics.base import MetricSet
    from mmft.losses.policy import Grpo
    from mmft.pipeline.policy import policy_rewards

    made = [Sample(f"r{n}", (), [user_turn(0, "q"), {**assistant_turn("a"), **({"weight": 0.5} if n == 2 else {})}], ("a",), "/", weight=0.3 if n == 1 else 1.0) for n in range(4)]
    settings = {"trainer": {"per_device_train_batch_size": 8}}
    with pytest.raises(UserError, match="objective=grpo: 2 of 4 rows of train have a loss weight, e.g. r1; "):
        policy_rewards(Grpo(), MetricSet({"exact_match": ExactMatch()}), made, None, settings)
    assert len(policy_rewards(Grpo(), MetricSet({"exact_match": ExactMatch()}), [made[0], made[3]], None, settings)) == 1


def test_a_missing_trl_is_one_line_that_says_what_to_install(mmft, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest))
    code, _, err = mmft(*SCENES, *GRPO)
    assert code == 2 and err == "mmft: objective=grpo needs the package trl: pip install 'mmft[rl]'\n"


def test_rewards_without_a_difference_are_said(mmft):
    """The base never writes the form that these pictures ask for."""
    code, out, err = mmft(*GRPO, "data=shapes", "data.pictures=40", "data.splits.validation=8", "trainer.max_steps=1", "evaluation.base=false", "evaluation.samples=0", "logger=none",
                          "metrics=[exact_match]")  # fmt: skip
    assert code == 0 and "nothing was learned" in out + err and "reward" in out, err


def test_the_keys_are_those_of_trl_with_its_defaults():
    import dataclasses

    from trl import GRPOConfig

    from mmft.losses.policy import CHOICES, Grpo

    theirs = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    ours = Grpo().arguments(77)
    assert ours.pop("max_completion_length") == 77
    assert {key: theirs[key] for key in ours} == ours
    help_text = next(f for f in dataclasses.fields(GRPOConfig) if f.name == "loss_type").metadata["help"]
    assert all(f"'{kind}'" in help_text for kind in CHOICES["loss_type"])


class Plain:
    """What a reward uses of a collator, for texts as they are."""

    end_ids = [0]

    def decode(self, ids):
        return ["".join(map(chr, filter(None, row))) for row in ids]

    def split_answer(self, text, generated=False):
        return "", text

    def written(self, sample):
        return sample

    def regions_in(self, text, sample):
        left, top, right, bottom = map(float, text.split())
        return [{"label": "", "image": 0, "box": [left, top, right, bottom]}]


def reward_values(metric, name, references, answers, **more):
    from mmft.config.build import build
    from mmft.data.sample import Sample, assistant_turn, user_turn
    from mmft.evaluation.metrics.base import MetricSet
    from mmft.evaluation.rewards import rewards_of

    [reward] = rewards_of([name], MetricSet({"m": build({"_target_": metric}, "metrics.m")}))
    content = more.pop("content", None)
    last = {"role": "assistant", "content": content} if content else assistant_turn(references[0])
    reward.reads([Sample("r", (), [user_turn(0, "q"), last], tuple(references), "/", **more)], Plain())
    return reward(completion_ids=[[*map(ord, answer), 0] for answer in answers], row=[0] * len(answers), prompts=None, trainer_state=None)


def test_metrics_are_rewards_with_more_always_better():
    """Hand values: one edit of four characters is a CER of 0.25; {a,b} against {a,c} has F1 1/2; boxes 10x10 shifted by 5 have IoU 50/150."""
    where = "mmft.evaluation.metrics."
    assert reward_values(where + "answers.ExactMatch", "exact_match", ["star"], ["star", " star ", "stars"]) == [1.0, 1.0, 0.0]
    pytest.importorskip("jiwer")
    assert reward_values(where + "error_rates.CharacterErrorRate", "cer", ["abcd"], ["abcd", "abed", ""]) == [0.0, -0.25, -1.0]
    assert reward_values(where + "structured.Json", "json_f1", ['{"a": 1, "b": 2}'], ['{"a": 1, "c": 2}', "{", '{"b": 2, "a": 1.0}']) == [0.5, 0.0, 1.0]
    box = [{"type": "box", "region": {"label": "", "image": 0, "box": [0.0, 0.0, 10.0, 10.0]}}]
    found = reward_values(where + "boxes.MeanIoU", "mean_iou", ["x"], ["0 0 10 10", "5 0 15 10"], content=box)
    assert found == [1.0, pytest.approx(1 / 3)]


@pytest.mark.parametrize("value, expected", [
    (math.nan, "is nan, not a finite number (the answer: 'sta')"), (math.inf, "is inf, not a finite number"), ([1.0, 2.0], "is [1.0, 2.0], not a finite number"),
    ("high", "is 'high', not a finite number"), (None, "is None, not a finite number"), (ZeroDivisionError("by nothing"), "ZeroDivisionError: by nothing"), ({}, "has no value for the answer 'sta'"),
])  # fmt: skip
def test_a_reward_that_is_no_number_is_named_with_its_row_and_metric(monkeypatch, value, expected):
    from mmft.common.errors import UserError
    from mmft.evaluation.metrics.answers import ExactMatch

    def row(self, record):
        if isinstance(value, Exception):
            raise value
        return {} if value == {} else {"exact_match": value}

    monkeypatch.setattr(ExactMatch, "row", row)
    with pytest.raises(UserError) as error:
        reward_values("mmft.evaluation.metrics.answers.ExactMatch", "exact_match", ["star"], ["sta"])
    assert str(error.value).startswith("objective.reward_funcs: exact_match (metrics.m) of row r: ") and expected in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("words", [
    ["objective.loss_type=dr_grpo", "objective.scale_rewards=none"], ["objective.loss_type=grpo", "objective.importance_sampling_level=sequence"], ["objective.loss_type=bnpo"],
    ["objective.loss_type=cispo", "objective.epsilon_high=5"], ["objective.loss_type=sapo"], ["objective.loss_type=luspo", "objective.importance_sampling_level=sequence"],
    ["objective.loss_type=vespo"], ["objective.loss_type=dapo", "objective.epsilon_high=0.28", "objective.mask_truncated_completions=true"],
    ["objective.steps_per_generation=4", "objective.num_iterations=2", "objective.top_entropy_quantile=0.5"], ["objective.use_adaptive_entropy=true", "objective.entropy_coef=0.01"],
    ["metrics=[exact_match,cer]", "objective.reward_funcs=[exact_match,cer]", "objective.reward_weights=[1,0.5]", "objective.multi_objective_aggregation=normalize_then_sum"],
    ["lora=none", "trainer.learning_rate=1e-4"], ["trainer.gradient_checkpointing=true"], ["lora.init_lora_weights=olora", "objective.beta=0.1"],
    ["trainer.learning_rates.language=1e-3", "trainer.ema_decay=0.9", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "evaluation.generate=true"],
    ["lora.modules_to_save=[merger]", "objective.beta=0.1"], ["lora.use_dora=true", "objective.beta=0.1"],
])  # fmt: skip
def test_every_variant_trains_and_leaves_a_usable_run(mmft, tmp_path, words):
    run = train(tmp_path, "variant", "trainer.max_steps=2", *words)
    result = summary(run)
    assert result["steps"] == 2 and math.isfinite(result["eval_loss"]) and all(math.isfinite(row["loss"]) for row in rows(run) if "loss" in row)
    code, _, err = mmft("evaluate", f"run={run.as_posix()}", output_dir=False)
    assert code == 0, err
    [file] = (run / "eval").glob("scenes_validation_*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["eval_loss"] == pytest.approx(result["eval_loss"], abs=2e-4)


# Families whose inputs or logits TRL's trainer cannot take: what the refusal names.
REFUSED = {"blip2": "Blip2ForConditionalGeneration"}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_family_trains_or_is_refused_by_name_before_the_first_step(mmft, small, tmp_path, kind):
    """Small random models: the probabilities of an answer by TRL equal those of the model itself, or training does not begin."""
    code, out, err = trained_family(mmft, small, tmp_path, kind)
    if kind in REFUSED:
        assert code == 2 and REFUSED[kind] in err and err.count("\n") == 1 and "step 1" not in out, err
    else:
        assert code == 0 and "step 2/2" in out, err[-1500:]


@pytest.mark.long
def test_rows_of_several_images_are_refused_where_the_trainer_has_no_place_for_their_number(mmft, small, tmp_path):
    """LLaVA-OneVision computes an image otherwise beside others, so its model reads how many a row has."""

    def two_images(rows):
        for n in (1, 5, 9):  # more than the split of four held-out rows takes
            rows[n]["image"] = [rows[n]["image"], rows[n + 1]["image"]]

    code, out, err = trained_family(mmft, small, tmp_path, "llava_onevision", two_images)
    assert code == 2 and "LlavaOnevisionForConditionalGeneration" in err and "batch_num_images" in err and err.count("\n") == 1 and "step 1" not in out, err


def trained_family(mmft, small, tmp_path, kind, change=lambda rows: None):
    from compared import draw

    drawn = draw(tmp_path / "drawn")
    rows = [json.loads(line) for line in (drawn / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    change(rows)
    (drawn / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = [f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "data=table", f"data.path={(drawn / 'pairs.jsonl').as_posix()}",
             "data.columns={image: image, prompt: question, text: chosen}", "data.splits.validation=4", "metrics=[cer]", "objective.reward_funcs=[cer]", "objective.beta=0.1",
             "generation.max_new_tokens=4", "evaluation.base=false", "evaluation.samples=0", "logger=none", "lora.r=4", "trainer.max_steps=2", "lora.lora_dropout=0"]  # fmt: skip
    return mmft(*GRPO, *words)


@pytest.mark.long
def test_an_exact_match_as_the_reward_is_learned(mmft, tmp_path):
    """A model that names the right colour or the next one at random, as in experiments/grpo: from chance to 0.8 of the held-out rows in 30 steps."""
    subprocess.run([sys.executable, str(ROOT / "experiments" / "preferences" / "build.py"), str(tmp_path / "made"), "480"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    data = ["data=table", f"data.path={(tmp_path / 'made' / 'rows.jsonl').as_posix()}", "data.columns.prompt=question", "data.splits.validation=80", "metrics=[exact_match]", "logger=none",
            "evaluation.samples=0"]  # fmt: skip
    start, tuned = tmp_path / "start", tmp_path / "tuned"
    code, _, err = mmft(*data, "data.columns.text=said", "trainer.max_steps=60", "trainer.per_device_train_batch_size=8", f"run_dir={start.as_posix()}")
    assert code == 0, err
    code, _, err = mmft("evaluate", f"run={start.as_posix()}", *data[:-2], "data.columns.text=right", output_dir=False)
    assert code == 0, err
    [file] = (start / "eval").glob("table_*.json")
    assert 0.3 < json.loads(file.read_text(encoding="utf-8"))["metrics"]["exact_match"] < 0.7, "undecided"
    code, _, err = mmft("objective=grpo", *data, "data.columns.text=right", f"lora.start={start.as_posix()}", "trainer.max_steps=30", "trainer.per_device_train_batch_size=32",
                        "trainer.learning_rate=3e-4", "trainer.logging_steps=5", "evaluation.base=false", f"run_dir={tuned.as_posix()}")  # fmt: skip
    assert code == 0, err
    found = summary(tuned)
    assert found["metrics"]["exact_match"] >= 0.8 and found["reward"]["last"] > found["reward"]["first"] + 0.15
