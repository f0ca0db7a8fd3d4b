"""Jointly trained points equal single runs; which points can join, and why others cannot; members that end early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from small_models import GROUP

from mmft.config import compose
from mmft.joint import partition

SMALL = ["data.pictures=16", "data.splits.validation=2", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2",
         "generation.max_new_tokens=2", "evaluation.samples=0", "evaluation.base=false", "logger=none"]  # fmt: skip


def runs(folder: Path) -> dict[str, Path]:
    return {p.name: p for p in folder.rglob("*") if (p / "snapshot.yaml").is_file()}


def losses(run: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) if key in row]


def weights(run: Path) -> dict:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def swept(mmft, folder: Path, *words: str) -> tuple[dict[str, Path], str]:
    code, out, err = mmft("-m", *words, f"output_dir={folder.as_posix()}", output_dir=False)
    assert code == 0, err[-3000:]
    return runs(folder), out


def assert_equal(joint: dict[str, Path], alone: dict[str, Path], tolerance: float = 1e-5) -> None:
    assert joint.keys() == alone.keys() and len(joint) >= 2
    for name in joint:
        a, b = losses(joint[name]), losses(alone[name])
        assert len(a) == len(b) >= 3 and max(abs(x - y) for x, y in zip(a, b)) <= tolerance, name
        wa, wb = weights(joint[name]), weights(alone[name])
        assert wa.keys() == wb.keys()
        assert max(float((wa[k] - wb[k]).abs().max()) for k in wa) <= tolerance, name
        assert max(float(wa[k].abs().max()) for k in wa if "lora_B" in k) > 100 * tolerance, "the adapter has changed"
        one, other = (json.loads((r[name] / "summary.json").read_text(encoding="utf-8")) for r in (joint, alone))
        for key in ("steps", "supervised_tokens", "effective_batch_size", "trainable_parameters", "metrics"):
            assert one[key] == other[key], key
        assert abs(one["eval_loss"] - other["eval_loss"]) <= tolerance


@pytest.mark.long
def test_four_ranks_equal_four_single_runs_with_dropout_and_clipping(mmft, tmp_path):
    """30 steps in fp32: losses, gradient norms and final weights within 1e-5 of those of single runs."""
    words = ["lora.r=2,4,8,16", *SMALL, "trainer.max_steps=30", "lora.lora_dropout=0.2", "trainer.max_grad_norm=0.3"]
    joint, out = swept(mmft, tmp_path / "joint", *words)
    assert "4 points in step" in out
    alone, _ = swept(mmft, tmp_path / "alone", *words, "hydra/launcher=basic")
    assert_equal(joint, alone)
    norms = losses(joint["lora.r-16"], "grad_norm")
    assert max(norms) > 0.3, "some gradients were clipped"
    assert len({tuple(losses(run)) for run in joint.values()}) == 4, "each has an adapter of its own"
    together = [json.loads((run / "summary.json").read_text(encoding="utf-8"))["trained_together"] for run in joint.values()]
    assert together == [4] * 4
    for run in joint.values():
        own = (run / "log.txt").read_text(encoding="utf-8")
        assert own.count("step 30/30") == 1 and own.count("run directory") == own.count("\n" + own.splitlines()[-1][:8] + "  finished ") == 1, own


@pytest.mark.parametrize("words", [
    pytest.param(["trainer.learning_rate=0.001,0.003", "trainer.lr_scheduler_type=linear,constant", "trainer.gradient_accumulation_steps=3",
                  "trainer.fold_accumulation=off"], marks=pytest.mark.long),
    pytest.param(["seed=1,2", "lora.target_modules=[q_proj,v_proj],[down_proj]"], marks=pytest.mark.long),
    pytest.param(["lora.r=2,8", "trainer.gradient_checkpointing=true", "lora.lora_dropout=0.3"], marks=pytest.mark.long),
    ["seed=1,2", "trainer.packing=true", "lora.lora_dropout=0.3"],
    ["lora.lora_dropout=0.0,0.1", "vision_cache=off", "trainer.weight_decay=0.1", "lora.use_rslora=true"],
])  # fmt: skip
def test_settings_in_which_points_of_a_group_may_differ(mmft, tmp_path, words):
    """Learning rate, schedule, targets, dropout, seed (and with it the order of rows): under accumulation, checkpointing, without a cache."""
    # Adam divides a gradient by its size: without a larger epsilon a gradient that is rounding noise moves its weight like any other
    words = [*words, *SMALL, "trainer.max_steps=3", "trainer.adam_epsilon=0.0001"]
    joint, out = swept(mmft, tmp_path / "joint", *words, "hydra/launcher=joint", "hydra.launcher.processes=1")  # with as many threads as a single run
    assert f"{len(joint)} points in step" in out
    alone, _ = swept(mmft, tmp_path / "alone", *words, "hydra/launcher=joint", "hydra.launcher.most=1")
    assert_equal(joint, alone)


@pytest.mark.long
def test_half_precision_with_fp32_adapters(mmft, tmp_path):
    """As on a GPU: bf16 weights under autocast. Losses are equal within the rounding of bf16, and the saved weights are fp32."""
    words = [*SMALL, "lora.r=2,8", "model.dtype=bf16", "lora.lora_dropout=0.2", "trainer.max_steps=6"]
    joint, out = swept(mmft, tmp_path / "joint", *words)
    assert "2 points in step" in out
    alone, _ = swept(mmft, tmp_path / "alone", *words, "hydra/launcher=basic")
    assert joint.keys() == alone.keys() and len(joint) == 2
    for name in joint:
        assert losses(joint[name]) == pytest.approx(losses(alone[name]), rel=0.02)
        assert all(w.dtype == torch.float32 and float(w.abs().max()) > 0 for w in weights(joint[name]).values())


@pytest.mark.parametrize("kind", [pytest.param("llava", marks=pytest.mark.long), "blip2", pytest.param("qwen3vl", marks=pytest.mark.long), pytest.param("qwen2vl packed", marks=pytest.mark.long)])
def test_other_families(small, mmft, tmp_path, kind):
    from PIL import Image

    kind, *packed = kind.split()
    lines = ["image,question,answer"]
    for n in range(6):
        Image.new("RGB", (56 + 28 * (n % 2), 56), (40 * n, 0, 200)).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,What is it?,{'a red square ' * (n % 3 + 1)}")
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    words = [
        "lora.r=2,4", f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}",
        "data.columns={image: image, text: answer, prompt: question}", "data.splits={validation: 2}", "logger=none", "trainer.max_steps=4",
        "trainer.per_device_train_batch_size=2", "trainer.learning_rate=0.01", "trainer.logging_steps=1", "generation.max_new_tokens=3",
        f"trainer.packing={str(bool(packed)).lower()}",
    ]  # fmt: skip
    joint, out = swept(mmft, tmp_path / "joint", *words)
    assert "2 points in step" in out
    alone, _ = swept(mmft, tmp_path / "alone", *words, "hydra/launcher=basic")
    assert_equal(joint, alone)


def test_members_that_stop_early_or_fail_do_not_change_the_others(mmft, tmp_path, monkeypatch):
    """A learning rate that diverges ends its own run; early stopping ends another; the third equals its single run."""
    words = [*SMALL, "trainer.max_steps=12", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.eval_strategy=steps", "trainer.eval_steps=2",
             "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_loss",
             "trainer.early_stopping_patience=1",
             "trainer.adam_epsilon=0.00001"]  # fmt: skip  # larger than its default for the reason above
    code, out, err = mmft("-m", "trainer.learning_rate=0.003,1e30,1e-12", *words, f"output_dir={(tmp_path / 'joint').as_posix()}", output_dir=False)
    assert code == 1 and "is not finite" in err and "3 points in step" in out
    found = runs(tmp_path / "joint")
    status = {name: json.loads((run / "summary.json").read_text(encoding="utf-8")) for name, run in found.items()}
    by_rate = {name.removeprefix("trainer.learning_rate-"): s for name, s in status.items()}
    assert by_rate["1e-30" if "1e-30" in by_rate else "1e30"]["status"] == "failed"
    assert by_rate["1e-12"]["status"] == "finished" and by_rate["1e-12"]["steps"] < 12, "nothing improves at this rate"
    assert by_rate["0.003"]["status"] == "finished" and by_rate["0.003"]["steps"] == 12
    code, _, err = mmft("trainer.learning_rate=0.003", *words, f"output_dir={(tmp_path / 'alone').as_posix()}", output_dir=False)
    assert code == 0, err
    (alone,) = runs(tmp_path / "alone").values()
    assert losses(alone) == pytest.approx(losses(found["trainer.learning_rate-0.003"]), abs=1e-5)


def test_the_base_is_unchanged_and_read_once(mmft, tmp_path, monkeypatch):
    from mmft.sweeps import context

    digests = []
    monkeypatch.setattr(context, "weights_digest", lambda model, digest=context.weights_digest: digests.append(digest(model)) or digests[-1])
    swept(mmft, tmp_path / "joint", "lora.r=2,4", *SMALL, "trainer.max_steps=3")
    assert len(digests) == 2 and digests[0] == digests[1], "hashed when it was read and after the group"


@pytest.mark.parametrize("words, why", [
    (["lora=none"], "lora=none"),
    (["lora.use_dora=true"], "lora.use_dora"),
    (["lora.init_lora_weights=pissa"], "lora.init_lora_weights"),
    (["lora.bias=all"], "lora.bias"),
    (["model.quantization={load_in_4bit: true}"], "model.quantization"),
    (["trainer.fsdp=full_shard"], "trainer.fsdp"),
    (["logger=swanlab"], "SwanLab"),
    (["model.rewrites=off"], "model.rewrites=off"),
])  # fmt: skip
def test_settings_that_keep_a_point_alone(words, why):
    assert why in partition.why_alone(OmegaConf.to_container(compose.compose(words), resolve=True))
    assert partition.why_alone(OmegaConf.to_container(compose.compose([]), resolve=True)) is None


@pytest.mark.parametrize("words, together", [
    (["lora.r=4"], True), (["seed=7"], True), (["trainer.learning_rate=0.1"], True), (["trainer.optim=sgd"], True),
    (["trainer.per_device_train_batch_size=3"], False), (["trainer.gradient_accumulation_steps=2"], False), (["trainer.max_steps=9"], False),
    (["data.pictures=99"], False), (["model.dtype=bf16"], False), (["collator.system=x"], False), (["trainer.bf16=true"], False), (["vision_cache=off"], False),
])  # fmt: skip
def test_settings_that_must_be_equal_in_a_group(words, together):
    plain, other = (partition.group_key(OmegaConf.to_container(compose.compose(w), resolve=True)) for w in ([], words))
    assert (plain == other) == together


@pytest.mark.long
def test_points_that_cannot_join_are_named_and_run_alone(mmft, tmp_path):
    found, out = swept(mmft, tmp_path / "o", "lora.r=2,4", "lora.scope=language,all", *SMALL, "trainer.max_steps=2")
    assert len(found) == 4 and all((run / "DONE").is_file() for run in found.values())
    assert "2 points in step" in out and out.count("\nalone ") == 2 and "the adapter reaches" in out


@pytest.mark.long
def test_memory_limits_a_pass_and_a_group(mmft, tmp_path, monkeypatch):
    """Two passes of two members each equal one of four; an adapter that does not fit into memory begins another group."""
    from mmft.joint import scheduler
    from mmft.joint.partition import Candidate

    words = ["lora.r=2,3,4,5", *SMALL, "trainer.max_steps=3"]
    words += ["hydra/launcher=joint", "hydra.launcher.processes=1"]
    joint, _ = swept(mmft, tmp_path / "one", *words)
    monkeypatch.setattr(scheduler, "passes_that_fit", lambda *_: 2)
    halved, out = swept(mmft, tmp_path / "two", *words)
    assert "2 adapters a pass" in out
    assert_equal(joint, halved)
    settings = OmegaConf.to_container(compose.compose([]), resolve=True)
    monkeypatch.setattr(partition, "_why_alone_by_plan", lambda candidate, context: setattr(candidate, "bytes", 40))
    monkeypatch.setattr(partition, "free_memory", lambda device: 100 / partition.USABLE)
    divided = partition.partition([Candidate(n, settings) for n in range(5)], None)
    assert [[c.number for c in g] for g in divided.groups] == [[0, 1], [2, 3]] and divided.alone[0][0].number == 4


def test_an_interruption_reaches_every_member(mmft, tmp_path, monkeypatch):
    from mmft.joint.scheduler import Group

    passed = Group._pass
    count = []

    def interrupted(self, waiting):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        passed(self, waiting)

    monkeypatch.setattr(Group, "_pass", interrupted)
    code, _, err = mmft("-m", "lora.r=2,4", *SMALL, "trainer.max_steps=9", f"output_dir={(tmp_path / 'o').as_posix()}", output_dir=False)
    assert code == 130
    assert [json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] for run in runs(tmp_path / "o").values()] == ["interrupted"] * 2
