"""Every private name of another library that mmft uses, in one place.

Each function has a reason and the versions it was written for. tests/common/test_private_api.py checks that the names exist and take
these arguments, and names the function to look at if they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate.state import GradientState
    from optuna.trial import FrozenTrial
    from transformers import PretrainedConfig, Trainer


def save_checkpoint(trainer: Trainer) -> None:
    """`Trainer._save_checkpoint` (transformers 5.20 to 5.24): save a checkpoint outside the training loop.

    Reason: after an out-of-memory error a new Trainer with smaller micro-batches goes on from the last finished step. The public way,
    `control.should_save`, works only inside the loop that has just ended.
    """
    trainer._save_checkpoint(trainer.model, None)


def load_checkpoint_weights(trainer: Trainer, checkpoint: Path) -> None:
    """`Trainer._load_from_checkpoint` (transformers 5.20 to 5.24): load the weights of a checkpoint, whatever wraps the model.

    Reason: a run that was stopped after its last step has nothing left to train, but `train(resume_from_checkpoint=...)` takes one more
    step if `max_steps` lies inside an epoch, or if early stopping ended the run.
    """
    trainer._load_from_checkpoint(str(checkpoint))


def set_sync_gradients(state: GradientState, value: bool) -> None:
    """`GradientState._set_sync_gradients` (accelerate 1.10 to 1.15): say whether the next backward pass ends a step.

    Reason: all Accelerators of a process share this state. A jointly trained run must find its own value when its turn comes again; the
    property is read-only.
    """
    state._set_sync_gradients(value)


@contextmanager
def kept_accelerator_state() -> Iterator[None]:
    """`AcceleratorState._shared_state`, `PartialState._shared_state` (accelerate 1.10 to 1.15): what all Accelerators of a process share stays.

    Reason: to make TrainingArguments clears it, and to make an Accelerator fills it again. A jointly trained run that fails between the two would leave the
    others without it. Nothing is changed if it was filled again.
    """
    from accelerate.state import AcceleratorState, PartialState

    shared = [state._shared_state for state in (AcceleratorState, PartialState)]
    before = [dict(values) for values in shared]
    try:
        yield
    finally:
        if before[0] and not shared[0]:
            for values, earlier in zip(shared, before):
                values.clear()
                values.update(earlier)


def trial_id(trial: FrozenTrial) -> int:
    """`FrozenTrial._trial_id` (optuna 4): the id by which a storage knows a trial.

    Reason: a point of a search reports to its trial from another process; `optuna.trial.Trial(study, id)` needs this id, and a trial's
    public number is not it.
    """
    return trial._trial_id


def hydra_callbacks() -> Any:
    """`hydra._internal.callbacks.Callbacks` (hydra-core 1.3): no callbacks.

    Reason: a launcher plugin takes a HydraContext, whose callbacks have no public class.
    """
    from hydra._internal.callbacks import Callbacks

    return Callbacks()


def attention_implementation(config: PretrainedConfig) -> str | None:
    """`PretrainedConfig._attn_implementation` (transformers 5.20 to 5.24): the attention that a loaded model uses.

    Reason: the public argument `attn_implementation` only says what was asked for; features of images depend on what is used.
    """
    return getattr(config, "_attn_implementation", None)


def keep_graphs_whole() -> None:
    """`torch._dynamo.config.optimize_ddp` (torch 2.10 to 2.15): do not cut a compiled function where several processes send gradients.

    Reason: layers are compiled one by one, so gradients are sent between them anyway; and torch cannot cut a graph with an autograd.Function.
    """
    import torch._dynamo

    torch._dynamo.config.optimize_ddp = False


def sacrebleu_counts(metric: Any, answers: list[str], references: list[list[str | None]]) -> tuple[list[list[float]], Callable[[Any], float]]:
    """`Metric._extract_corpus_statistics`, `Metric._compute_score_from_stats` (sacrebleu 2.4 to 2.6): (counts of each row, the score of sums of them).

    Reason: the score of a resample follows from the sum of its rows' counts. The public `corpus_score` counts n-grams again for every
    resample, and sacrebleu's own paired test gives no interval of a difference.
    """
    return metric._extract_corpus_statistics(answers, references), lambda sums: float(metric._compute_score_from_stats(sums).score)


def names_taken_for_experts(model_type: str) -> set[str]:
    """`transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING` (peft 0.21): names of layers that peft takes for the experts of this model type.

    Reason: for these types peft turns `target_modules` of such names into `target_parameters` on all experts, because experts were linear
    layers before transformers 5. A dense layer or a shared expert of the same name then gets no adapter. For these types peft also reads a
    regular expression as a list of the last words of the names it matches.
    """
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(model_type) is None:
        return set()
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


def onednn_linear() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None:
    """`torch.ops.mkldnn._linear_pointwise` (torch 2.10 to 2.15): `F.linear` of fp32 tensors by oneDNN, without a gradient; None where torch has no such operation.

    Reason: torch has no public way to multiply fp32 matrices with oneDNN and not with MKL. Its own compiler calls this operation.
    """
    import torch

    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if operation is None else lambda x, weight, bias: operation(x, weight, bias, "none", [], "")


def policy_log_probs(trainer: Any, model: Any, inputs: dict[str, Any], tokens: int, images: int) -> Any:
    """`GRPOTrainer._get_per_token_logps_and_entropies` (trl 1.16): the log-probabilities (1, tokens) of the last tokens of a sequence with `images` images.

    Reason: before training they are compared with those of the model itself, because the trainer hands only inputs that it knows to a model.
    """
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    if images:
        rest["num_images"], pixels = [images], rest["pixel_values"]
        if "spatial_shapes" in rest or pixels.ndim == 4 and len(pixels) != images:  # tiles, which the trainer counts by the image processor
            rest["num_tiles"] = [len(pixels)]
    return trainer._get_per_token_logps_and_entropies(model, inputs["input_ids"], inputs["attention_mask"], tokens, **rest)[0]


def policy_counts(trainer: Any) -> dict[str, list[float]]:
    """`GRPOTrainer._metrics` (trl 1.16): what was counted in training since the last log, by name.

    Reason: the trainer's `log` adds it to whatever is logged next, which may be an evaluation while training.
    """
    counts: dict[str, list[float]] = trainer._metrics["train"]
    return counts


def policy_state(trainer: Any) -> dict[str, Any]:
    """`GRPOTrainer._step`, `GRPOTrainer._buffered_inputs`, `GRPOTrainer._metrics` (trl 1.16): what a checkpoint of the Trainer lacks to go on
    in the middle of sampled answers.

    Reason: the trainer begins a resumed run with new answers, at a step 0 of its own, so that it would differ from one that was not stopped.
    """
    every = trainer.args.steps_per_generation * trainer.num_iterations
    inputs = trainer._buffered_inputs if trainer._step % every else None
    return {"step": trainer._step, "inputs": inputs, "counts": {name: list(values) for name, values in trainer._metrics["train"].items()}}


def restore_policy(trainer: Any, state: dict[str, Any]) -> None:
    """`GRPOTrainer._step`, `GRPOTrainer._buffered_inputs`, `GRPOTrainer._metrics` (trl 1.16): take up what `policy_state` returned.

    Reason: as there.
    """
    trainer._step, trainer._buffered_inputs = state["step"], state["inputs"]
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update(state["counts"])
