"""Chooser: answers that are one of a row's choices, by the likelihood of each choice."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..collators.types import BatchMaker
from ..common.errors import UserError
from ..common.model_parts import is_encoder_decoder
from ..data.sample import Message, Sample, text_part, with_answer
from ..system.console import shows_progress

log = logging.getLogger("mmft")

PLACEHOLDER = "-"  # an answer that is equal for all rows, to compare the lengths of their prompts
# Two ways of computing one number agree up to rounding; positions or images that are wrong differ by more. Per token.
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
HALF_TOLERANCE = 0.25


@dataclass(frozen=True)
class Option:
    """A choice of a row. likelihood: its log-likelihood, the end token included. tokens: their number, the end token included."""

    likelihood: float
    tokens: int


@dataclass
class Chooser:
    """norm: evaluation.choice_norm. batch_size: rows times choices in one batch, at least one row with all of its choices.

    shares: whether this model computes a prompt once for all choices; None until the first row was computed in both ways.
    """

    norm: str = "none"
    batch_size: int = 16
    shares: bool | None = field(default=None, init=False)

    @classmethod
    def from_settings(cls, evaluation: Mapping[str, Any]) -> Chooser | None:
        """What the config's section `evaluation` asks for; None if answers are generated."""
        if evaluation.get("answer", "generate") != "choose":
            return None
        return cls(evaluation.get("choice_norm", "none"), evaluation["batch_size"])

    @classmethod
    def for_rows(cls, evaluation: Mapping[str, Any], rows: Sequence[Sample]) -> Chooser | None:
        """For a further data set, which may have no choices: None if a row has none."""
        found = cls.from_settings(evaluation)
        return found if found is not None and all(rows[i].choices for i in range(len(rows))) else None

    def probabilities(self, model: Any, collator: BatchMaker, rows: Sequence[Sample], progress: bool = False) -> list[dict[str, float]]:
        """For each row the probability of each of its choices, in their order; they add up to 1. Raises UserError.

        Softmax of the log-likelihoods as `norm` says: `none` as they are, `token` divided by the number of tokens, `character` by
        the number of characters of the text, `prior` minus the log-likelihood of the same text behind the same prompt without
        its images (domain-conditional PMI, Holtzman et al., "Surface Form Competition", 2021, with the prompt as the domain).
        """
        options = self.options(model, collator, rows, progress)
        priors: dict[str, dict[str, float]] = {}
        result = []
        for i, scored in enumerate(options):
            prior = self._prior(model, collator, rows[i], priors) if self.norm == "prior" else {}
            scores = {text: self._score(text, option, prior) for text, option in scored.items()}
            largest = max(scores.values())
            weights = {text: math.exp(score - largest) for text, score in scores.items()}
            total = sum(weights.values())
            result.append({text: weights[text] / total for text in rows[i].choices})
        return result

    def _score(self, text: str, option: Option, prior: Mapping[str, float]) -> float:
        if self.norm == "token":
            return option.likelihood / option.tokens
        return option.likelihood / len(text) if self.norm == "character" else option.likelihood - prior.get(text, 0.0)

    def options(self, model: Any, collator: BatchMaker, rows: Sequence[Sample], progress: bool = False) -> list[dict[str, Option]]:
        """The choices of each row, sorted by their text: so their order in a row changes no bit of any number.

        Rows with equally long prompts and equally many choices are computed together.
        """
        import torch
        from tqdm import tqdm

        from ..common.tensors import eval_mode

        groups: dict[tuple[int, int, bool], list[int]] = {}
        for i in range(len(rows)):
            row = rows[i]
            length = collator.measure(with_answer(row, PLACEHOLDER)).tokens if len(rows) > 1 else 0
            groups.setdefault((length, len(row.choices), bool(row.images)), []).append(i)
        found: dict[int, dict[str, Option]] = {}
        ids: dict[str, list[int]] = {}
        with torch.no_grad(), eval_mode(model), tqdm(total=len(rows), desc="choices", leave=False, disable=not (progress and len(rows) > 1 and shows_progress())) as bar:
            for (_, count, _), indices in groups.items():
                size = max(1, self.batch_size // count)
                for start in range(0, len(indices), size):
                    part = indices[start : start + size]
                    found.update(zip(part, self._batch(model, collator, [rows[i] for i in part], ids), strict=True))
                    bar.update(len(part))
        return [found[i] for i in range(len(rows))]

    def _batch(self, model: Any, collator: BatchMaker, samples: list[Sample], ids: dict[str, list[int]]) -> list[dict[str, Option]]:
        """The choices of rows with equally long prompts. ids: tokens that were computed before, by prompt and choice."""
        texts = [sorted(sample.choices) for sample in samples]
        answers = [[_answer_ids(collator, sample, text, ids) for text in own] for sample, own in zip(samples, texts, strict=True)]
        if self.shares is None and samples[0].images:
            self.shares = self._can_share(model, collator, samples[0], answers[0])
        likelihoods = (self._shared(model, collator, samples, answers) if self.shares and samples[0].images else None) or [
            self._plain(model, collator, sample, own) for sample, own in zip(samples, texts, strict=True)
        ]
        return [
            {text: Option(value, len(tokens)) for text, value, tokens in zip(own, values, lists, strict=True)}
            for own, values, lists in zip(texts, likelihoods, answers, strict=True)
        ]

    def _shared(self, model: Any, collator: BatchMaker, samples: list[Sample], answers: list[list[list[int]]]) -> list[list[float]] | None:
        """None if the prompts turn out to have different lengths."""
        from . import likelihood

        prompt = collator.prompt(samples)
        if not is_encoder_decoder(model.config) and not bool(prompt["attention_mask"].all()):
            return None
        values: list[list[float]] = likelihood.shared(model, prompt, answers).tolist()
        return values

    def _plain(self, model: Any, collator: BatchMaker, sample: Sample, texts: Sequence[str]) -> list[float]:
        from . import likelihood

        values: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = collator.uncached([with_answer(sample, text) for text in texts[start : start + self.batch_size]])
            values += likelihood.plain(model, batch).tolist()
        return values

    def _can_share(self, model: Any, collator: BatchMaker, sample: Sample, answers: list[list[int]]) -> bool:
        """Compute a row in both ways; say so if the model cannot continue from a shared prompt."""
        import torch

        whole = self._plain(model, collator, sample, sorted(sample.choices))
        try:
            [values] = self._shared(model, collator, [sample], [answers]) or [[]]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            tolerance = TOLERANCE.get(str(getattr(model, "dtype", "")).removeprefix("torch."), HALF_TOLERANCE)
            if len(values) == len(whole) and all(abs(a - b) <= tolerance * len(ids) for a, b, ids in zip(values, whole, answers, strict=True)):
                return True
            reason = "the numbers differ from those of whole sequences"
        log.info("%-14s each choice is computed with its whole prompt, which takes longer: %s", "choices", reason)
        return False

    def _prior(self, model: Any, collator: BatchMaker, sample: Sample, known: dict[str, dict[str, float]]) -> dict[str, float]:
        """The log-likelihood of each choice without the images. known: those of earlier rows, by prompt and choices."""
        import torch

        from ..common.tensors import eval_mode
        from . import likelihood

        bare = replace(sample, images=(), sha256=(), messages=[_without_images(message) for message in sample.messages])
        texts = sorted(sample.choices)
        key = json.dumps([bare.messages[:-1], texts])
        if key not in known:
            with torch.no_grad(), eval_mode(model):
                if not likelihood.needs_pixels(model):
                    values = self._plain(model, collator, bare, texts)
                else:
                    values = likelihood.without_images(model, collator.uncached([with_answer(sample, text) for text in texts]), collator.image_token_id).tolist()
            known[key] = dict(zip(texts, values, strict=True))
        return known[key]


def chosen(probabilities: Mapping[str, float]) -> str:
    """The choice with the largest probability; of equal ones the first by its text, whatever their order."""
    return min(probabilities, key=lambda text: (-probabilities[text], text))


def check_choices(evaluation: Mapping[str, Any], rows: Sequence[Sample], where: str) -> None:
    """With evaluation.answer=choose every row needs choices. where: names the rows. Raises UserError."""
    if evaluation.get("answer", "generate") != "choose":
        return
    without = [rows[i].id for i in range(len(rows)) if not rows[i].choices]
    if without:
        raise UserError(f"evaluation.answer=choose: {len(without)} of {len(rows)} rows of {where} have no choices, e.g. {without[0]}; name them with"
                        " data.choices=[A,B] or data.columns.choices=COLUMN, or use evaluation.answer=generate")  # fmt: skip


def _answer_ids(collator: BatchMaker, sample: Sample, text: str, known: dict[str, list[int]]) -> list[int]:
    key = json.dumps([sample.messages[:-1], text])
    if key not in known:
        known[key] = collator.answer_ids(with_answer(sample, text))
    return known[key]


def _without_images(message: Message) -> Message:
    return {**message, "content": [part for part in message["content"] if part["type"] != "image"] or [text_part("")]}
