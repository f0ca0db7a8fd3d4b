"""The conformance checks. Each takes a Subject and returns what it saw; a check that fails raises Failed.

Every check has a deliberately broken family in the tests that fails this check.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.attach import adapted_names, attach_adapter
from ..adapters.experts import expert_tensors
from ..adapters.merge import merge_adapter
from ..adapters.methods import LORA
from ..adapters.plan import AdapterPlan, plan_adapter
from ..audit.checks import check_blindness
from ..collators.base import IGNORE
from ..common.errors import UserError
from ..common.model_parts import is_encoder_decoder, part_of
from ..data.sample import Sample
from ..evaluation.evaluate import Evaluator
from ..losses.supervised import supervised_loss
from .subject import ANSWERS, QUESTIONS, Subject, close

ADAPTER = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "init_lora_weights": False}


class Failed(Exception):
    """A check failed; the message says what was seen."""


class NotApplicable(Exception):
    """A check has no meaning for this family; the message says why."""


@dataclass(frozen=True)
class CheckResult:
    """passed: None if the check does not apply. detail: what was seen, in one line."""

    name: str
    passed: bool | None
    detail: str


def parts(subject: Subject) -> str:
    """Every parameter belongs to a part of the model (vision, connector, Q-Former, language)."""
    other = [name for name, _ in subject.model.named_parameters() if part_of(name) == "other"]
    if other:
        raise Failed(f"{len(other)} parameters belong to no part, e.g. {other[0]}")
    return ", ".join(sorted({part_of(name) for name, _ in subject.model.named_parameters()}))


def labels(subject: Subject) -> str:
    """The tokens with loss are the answer and one end token, in one run; decoding them gives the answer back.

    Before the answer may stand what the template itself writes there, and the model therefore too (an empty think block).
    """
    tokenizer = subject.collator.tokenizer
    for row, answer in zip(subject.rows(), ANSWERS, strict=True):
        batch = subject.collator([row])
        ids, marks = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        supervised = [i for i, label in enumerate(marks) if label != IGNORE]
        if supervised != list(range(supervised[0], supervised[-1] + 1)) or any(marks[i] != ids[i] for i in supervised):
            raise Failed("the tokens with loss are not one run of the row's own tokens")
        *answer_ids, last = (ids[i] for i in supervised)
        text = tokenizer.decode(answer_ids, skip_special_tokens=False).strip()
        if text != answer and text != _completion(subject, row, answer):
            raise Failed(f"loss on {text!r} where the answer is {answer!r}")
        if last != subject.collator.end_token_id or last in answer_ids:
            raise Failed(f"the answer closes with {tokenizer.decode(last)!r}, not with its end token")
        if tokenizer.pad_token_id == last and bool((batch["attention_mask"][0] == 0).any()):
            raise Failed("padding is the end token")
    return "answer and end token"


def image_tokens(subject: Subject) -> str:
    """Each row holds as many image tokens as the model computes features for its own images."""
    import torch

    from ..feature_cache.image_features import feature_arguments

    model = subject.model
    if not hasattr(model, "get_image_features"):
        raise NotApplicable("the model has no image features to count")
    counts = []
    for row in subject.rows():
        batch = subject.batch([row])
        names = feature_arguments(model)
        with torch.no_grad():
            output = model.get_image_features(**{k: v for k, v in batch.items() if k in names}, return_dict=True)
        # without a pooled output, the features are the tower's, or pairs of a layer and what is added there, as many for each layer
        pooled, deep = getattr(output, "pooler_output", None), getattr(output, "deepstack_features", None)
        features = pooled if pooled is not None else deep[0][1] if deep else output.last_hidden_state
        n_features = sum(f.reshape(-1, f.shape[-1]).shape[0] for f in features)
        n_tokens = sum(subject.family.image_places(batch, model.config))
        if n_features != n_tokens or not n_tokens:
            raise Failed(f"{n_tokens} image tokens in the text and {n_features} image features")
        counts.append(str(n_tokens))
    return f"{', '.join(counts)} tokens"


def sees_the_image(subject: Subject) -> str:
    """Another image changes the loss of a row."""
    check = check_blindness(subject.model, subject.collator, subject.rows())
    if not check.passed:
        raise Failed(check.detail)
    return check.detail


def padding(subject: Subject) -> str:
    """Rows in one padded batch give the logits of the same rows alone."""
    import torch

    rows = subject.rows()
    together, alone = subject.logits(rows), torch.cat([subject.logits([row]) for row in rows])
    if not close(together, alone):
        raise Failed(f"logits differ by up to {float((together - alone).abs().max()):.3g}")
    return f"within {float((together - alone).abs().max()):.1g}"


def prompt_prefix(subject: Subject) -> str:
    """The prompt to generate from is the beginning of the training row, up to the first token with loss."""
    for row in subject.rows():
        prompt, batch = subject.collator.prompt([row])["input_ids"][0].tolist(), subject.collator([row])
        first = int((batch["labels"][0] != IGNORE).nonzero()[0])
        if batch["input_ids"][0, :first].tolist() != prompt:
            raise Failed("the prompt in use is not the beginning of the row in training")
    return "equal"


def adapter(subject: Subject) -> str:
    """The adapter sits on the planned modules and expert tensors; gradients arrive there and nowhere else."""
    with subject.copy_of_model() as model:
        plan = _plan(model, subject)
        tuned = _with_adapter(model, plan)
        prefix = tuned.base_model.prefix
        adapted, planned = adapted_names(tuned), {*plan.adapted, *plan.parameters}
        if adapted != planned:
            raise Failed(f"{len(adapted)} modules are adapted, {len(planned)} were planned")
        trainable = {n for n, p in tuned.named_parameters() if p.requires_grad}
        if stray := [n for n in trainable if prefix not in n]:
            raise Failed(f"{stray[0]} is trainable and belongs to no adapter")
        loss, count = supervised_loss(tuned.train(), subject.batch(subject.rows()))
        (loss / count).backward()
        reached = {n for n, p in tuned.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
        # the last layer's experts for image tokens cannot change an answer: of expert tensors, one layer must be reached
        kinds = {_kind(n) for n in reached}
        if missing := sorted(n for n in trainable - reached if not ("expert" in n and _kind(n) in kinds)):
            raise Failed(f"no gradient reaches {missing[0]} ({len(missing)} of {len(trainable)})")
        if stray := sorted(reached - trainable):
            raise Failed(f"a gradient reaches {stray[0]}, which is frozen")
    return f"{len(plan.adapted)} modules" + (f", {len(plan.parameters)} expert tensors" if plan.parameters else "")


def end_of_text(subject: Subject) -> str:
    """Generation stops at the end token that was trained: it is forced as the third token, and nothing follows it."""
    from transformers import LogitsProcessor, LogitsProcessorList

    collator, row = subject.collator, subject.rows()[0]
    encoder_decoder = is_encoder_decoder(subject.model.config)
    trained = collator([row])["labels"][0]
    end = int(trained[trained != IGNORE][-1])
    steps = 0

    def force(scores: Any) -> Any:
        nonlocal steps
        forced = scores.clone()
        forced[..., collator.end_ids] = float("-inf")
        if steps == 2:
            forced[:] = float("-inf")
            forced[..., end] = 0.0
        steps += 1
        return forced

    class Force(LogitsProcessor):
        def __call__(self, ids: Any, scores: Any) -> Any:
            return force(scores)

    evaluator = Evaluator([row], collator, {"max_new_tokens": 6, "do_sample": False}, 1)
    evaluator.answer(subject.model, collator.prompt([row]), logits_processor=LogitsProcessorList([Force()]))
    if not steps:  # Janus hands no logits processor on
        hook = subject.model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: force(logits))
        try:
            evaluator.answer(subject.model, collator.prompt([row]))
        finally:
            hook.remove()
    if steps != 3:
        raise Failed(f"{steps} tokens were generated where the third is the end token")
    return "stops" + (" (decoder)" if encoder_decoder else "")


def save_and_merge(subject: Subject) -> str:
    """The saved adapter gives the same logits in plain peft; the merged model too."""
    from peft import PeftModel

    rows = subject.rows()
    with tempfile.TemporaryDirectory() as folder, subject.copy_of_model() as model:
        tuned = _with_adapter(model, _plan(model, subject))
        wanted, untuned = subject.logits(rows, tuned), subject.logits(rows)
        if close(wanted, untuned, 1e-4):
            raise Failed("the adapter changes no logit")
        tuned.save_pretrained(Path(folder), save_embedding_layers=False)
        with subject.copy_of_model() as fresh:
            again = subject.logits(rows, PeftModel.from_pretrained(fresh, folder))
        if not close(again, wanted):
            raise Failed(f"plain peft gives other logits, by up to {float((again - wanted).abs().max()):.3g}")
        merged = subject.logits(rows, merge_adapter(_own_weights(tuned)))
    if not close(merged, wanted):
        raise Failed(f"the merged model gives other logits, by up to {float((merged - wanted).abs().max()):.3g}")
    return f"within {float((merged - wanted).abs().max()):.1g}"


def fast_paths(subject: Subject) -> str:
    """Feature cache, supervised logits and rewrites give the logits of the plain path, or are off with a reason."""
    import torch

    from ..feature_cache.image_features import FeatureLayout, Uncacheable, takes_features
    from ..losses.supervised import supervised_logits, takes_logits_to_keep
    from ..rewrites.apply import rewrite_for_training

    rows, notes = subject.rows(), []
    wanted = subject.logits(rows)
    if not takes_features(subject.model):
        notes.append("feature cache off: features are not of the image alone")
    else:
        encoded, tensors = subject.collator.encode_checked(rows, False)  # type: ignore[attr-defined]
        layout = FeatureLayout()
        try:
            images = layout.compute(subject.model, tensors, len(rows))
            batch = subject.collator.assemble(rows, encoded, layout.inputs(images), False)  # type: ignore[attr-defined]
            with torch.no_grad():
                cached = supervised_logits(subject.model, batch)[0].float()
            if not close(cached, wanted):
                raise Failed(f"cached features give other logits, by up to {float((cached - wanted).abs().max()):.3g}")
            notes.append("feature cache equal")
        except Uncacheable as reason:
            notes.append(f"feature cache off: {reason}")
    if takes_logits_to_keep(subject.model):
        batch = subject.batch(rows)
        keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
        keep[:, :-1] = batch["labels"][:, 1:] != IGNORE
        with torch.no_grad():
            whole = subject.model(**{k: v for k, v in batch.items() if k not in ("labels", "row_ids")}, use_cache=False).logits[keep].float()
        if not close(whole, wanted):
            raise Failed(f"logits at supervised positions differ by up to {float((whole - wanted).abs().max()):.3g}")
        notes.append("supervised logits equal")
    with subject.copy_of_model() as model:
        tuned = _with_adapter(model, _plan(model, subject))
        before = subject.logits(rows, tuned)
        rewrites = rewrite_for_training(tuned, "auto", 0)
        after = subject.logits(rows, tuned)
        if not close(after, before):
            raise Failed(f"rewrites give other logits, by up to {float((after - before).abs().max()):.3g}")
        notes.append(f"{len(rewrites.classes)} rewrites equal")
    return "; ".join(notes)


def image_counts(subject: Subject) -> str:
    """A row with several images and a row without one are trained, also beside a row with one image, or refused with a reason."""
    import torch

    notes = []
    for name, images in (("several images", (0, 1)), ("no image", ())):
        row = subject.row(name, images, QUESTIONS[0], ANSWERS[0])
        try:
            batch = subject.batch([row])
        except UserError as error:
            notes.append(f"{name}: refused ({error})")
            continue
        with torch.no_grad():
            loss, count = supervised_loss(subject.model, batch)
        if not bool(torch.isfinite(loss)) or not int(count):
            raise Failed(f"{name}: the loss is {float(loss)}")
        try:
            beside = subject.logits([row, subject.rows()[0]])[: int(count)]
        except UserError as error:
            notes.append(f"{name}: refused beside one image ({error})")
            continue
        if not close(beside, alone := subject.logits([row])):
            raise Failed(f"{name}: beside a row with one image, logits differ by up to {float((beside - alone).abs().max()):.3g}")
        if images and check_blindness(subject.model, subject.collator, subject.rows()).passed:
            swapped = subject.row(name, (1, 0), QUESTIONS[0], ANSWERS[0])
            if close(subject.logits([row]), subject.logits([swapped]), 1e-6):
                raise Failed("the order of two images changes nothing")
        notes.append(name)
    return "; ".join(notes)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "parts": parts, "labels": labels, "image tokens": image_tokens, "sees the image": sees_the_image, "padding": padding, "prompt": prompt_prefix,
    "adapter": adapter, "end of text": end_of_text, "save and merge": save_and_merge, "fast paths": fast_paths, "image counts": image_counts,
}  # fmt: skip


def run_checks(subject: Subject) -> list[CheckResult]:
    """All checks. An error inside a check is its failure, so that one defect hides no other."""
    results = []
    for name, check in CHECKS.items():
        try:
            results.append(CheckResult(name, True, check(subject)))
        except NotApplicable as reason:
            results.append(CheckResult(name, None, str(reason)))
        except Failed as failure:
            results.append(CheckResult(name, False, str(failure)))
        except Exception as error:
            results.append(CheckResult(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    return results


def _completion(subject: Subject, row: Sample, answer: str) -> str | None:
    """What the processor's own template writes after its generation prompt, up to the answer's end; None if it does not continue the prompt."""
    processor = getattr(subject.collator, "processor", None)
    messages = [{"role": m["role"], "content": list(m["content"])} for m in row.messages]
    try:
        whole = processor.apply_chat_template(messages, tokenize=False)  # type: ignore[union-attr]
        prompt = processor.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)  # type: ignore[union-attr]
    except Exception:  # no template, or one that takes other forms of messages
        return None
    return whole[len(prompt) : whole.rfind(answer) + len(answer)].strip() if whole.startswith(prompt) else None


def _kind(name: str) -> str:
    """A parameter's name without numbers of layers."""
    return re.sub(r"\.\d+\.", ".", name)


def _plan(model: Any, subject: Subject) -> AdapterPlan:
    """An adapter on the linear layers and, with LoRA, on the expert tensors of the language model."""
    experts = [name for name in expert_tensors(model) if part_of(name) == "language"]
    beside = {"target_parameters": experts} if experts and subject.adapter.get("method", LORA) == LORA else {}
    return plan_adapter(model, ADAPTER | beside | subject.adapter)


def _with_adapter(model: Any, plan: AdapterPlan) -> Any:
    """The model with an adapter of fixed random weights, which changes logits noticeably."""
    import torch

    torch.manual_seed(0)
    return attach_adapter(model, plan)


def _own_weights(model: Any) -> Any:
    """The model with a copy of every weight that the adapter will be added to: merging works in place, and the base's are shared."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            for name, parameter in list(base.named_parameters(recurse=False)):
                setattr(base, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return model
