"""Points with preference objectives, trained in step, equal single runs: every beta and objective over one batch of pairs."""

from __future__ import annotations

import json

import pytest
from compared import draw, pairs
from test_joint import assert_equal, losses, swept

from mmft.config.compose import compose
from mmft.config.plain import to_plain
from mmft.joint import partition

STEADY = ["trainer.logging_steps=1", "trainer.adam_epsilon=0.0001", "evaluation.base=false"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


@pytest.mark.parametrize("words", [
    ["objective=dpo", "objective.beta=0.05,0.5", "lora.lora_dropout=0.2", "trainer.max_steps=3"],
    pytest.param(["objective=dpo,ipo,simpo,orpo,mpo", "trainer.learning_rate=0.001,0.003"], marks=pytest.mark.long),
    pytest.param(["objective=dpo", "seed=1,2", "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=2", "lora.r=2,8",
                  "vision_cache=off"], marks=pytest.mark.long),
])  # fmt: skip
def test_points_in_step_equal_points_alone(mmft, drawn, tmp_path, words):
    words = [*pairs(drawn), *STEADY, *words]
    joint, out = swept(mmft, tmp_path / "joint", *words, "hydra.launcher.processes=1")
    assert f"{len(joint)} points in step" in out
    alone, _ = swept(mmft, tmp_path / "alone", *words, "hydra/launcher=basic")
    assert_equal_scores(joint, alone)
    for key in ("reward_margin",):
        for name in joint:
            assert losses(joint[name], key) == pytest.approx(losses(alone[name], key), abs=1e-4)
    assert len({tuple(losses(run)) for run in joint.values()}) == len(joint), "each has its own loss"


def assert_equal_scores(joint, alone):
    """`assert_equal`, with scores compared as numbers: in step they are computed in other batches."""
    metrics = {}
    for runs in (joint, alone):
        for name, run in runs.items():
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            metrics.setdefault(name, []).append(summary["metrics"])
            (run / "summary.json").write_text(json.dumps({**summary, "metrics": {}}), encoding="utf-8")
    assert_equal(joint, alone)
    for name, (one, other) in metrics.items():
        assert one.keys() == other.keys() and {"kl", "reward_margin"} <= one.keys()
        assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-4), name


def test_which_points_share_a_batch(drawn):
    def settings(*words):
        return to_plain(compose([*pairs(drawn), *words]))

    assert partition.why_alone(settings("objective=kto")) == "objective=kto needs a pass of its own for the answers of other rows"
    keys = [partition.group_key(settings(f"objective={name}", f"objective.beta={beta}")) for name, beta in (("dpo", 0.1), ("dpo", 0.2), ("orpo", 0.1))]
    assert len(set(keys)) == 1 and partition.group_key(settings()) not in keys
