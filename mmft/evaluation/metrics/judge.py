"""Metric that asks a language model, on a host that the command line names, how well an answer agrees with its references."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...common.errors import UserError
from ...common.records import AnswerRecord, MetricValues
from ...config.choices import JUDGE_VARIABLE
from .base import Metric, Score

KEY_VARIABLE = "MMFT_JUDGE_KEY"  # the host's key; no file can set it
MAX_BYTES = 1_000_000  # of a response
PROMPT = """Compare an answer with the reference answers to the same question about an image, which you do not see.

Question: {question}
Reference answers: {references}
Answer: {answer}

How well does the answer agree with a reference in meaning? Reply with one whole number from 0 (wrong) to 10 (the same meaning), and nothing else."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


class Judge(Metric):
    """A number from 0 to 10 that an OpenAI-compatible host gives each answer, divided by 10.

    The host's address comes from the flag --judge (`--judge https://host/v1`), its key from the environment variable MMFT_JUDGE_KEY. model: the
    name by which the host knows its model. prompt: with {question}, {references} and {answer}; null: PROMPT. Images are not sent. cache: a
    folder; a question that was asked before is read from there. timeout: seconds for one question. Training never asks.
    """

    SCORES = (Score("judge", "Judged by a language model"),)
    AFTER_TRAINING = True

    def __init__(self, model: str | None = None, prompt: str | None = None, cache: str = "outputs/judge", timeout: float = 60.0) -> None:
        self.model, self.prompt, self.cache, self.timeout = model, prompt or PROMPT, Path(cache), timeout
        missing = next((name for name in ("{references}", "{answer}") if name not in self.prompt), None)
        if missing:
            raise UserError(f"metrics.judge.prompt: must hold {missing}")

    def ready(self) -> None:
        """Raises UserError without a host or a model."""
        address = os.environ.get(JUDGE_VARIABLE, "")
        if not address:
            raise UserError("metrics: judge asks a host that only the command names, after training: mmft evaluate run=DIR metrics=[judge] --judge https://HOST/v1")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise UserError(f"--judge {address}: must be the base address of an OpenAI-compatible host, https://HOST/v1 (its key: {KEY_VARIABLE})")
        if not self.model:
            raise UserError("metrics: judge needs the name of the host's model: metrics.judge.model=NAME")

    def row(self, row: AnswerRecord) -> MetricValues:
        references = json.dumps(row["references"], ensure_ascii=False)
        texts = {"question": row.get("prompt") or "(none)", "references": references, "answer": str(row["prediction"])}
        # one pass: an answer that holds "{references}" is not filled in
        question = re.sub(r"\{(question|references|answer)\}", lambda match: texts[match[1]], self.prompt)
        return {"judge": _number(self._cached(question)) / 10}

    def note(self, rows: Sequence[AnswerRecord]) -> str:
        return f"by {self.model}, prompt {hashlib.sha256(self.prompt.encode()).hexdigest()[:8]}"

    def _cached(self, question: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 8}
        file = self.cache / f"{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}.json"
        if file.is_file():
            return str(json.loads(file.read_text(encoding="utf-8"))["reply"])
        reply = self._ask(body)
        _number(reply)  # what is no number is asked again
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps({"model": self.model, "question": question, "reply": reply}, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, file)
        return reply

    def _ask(self, body: dict[str, Any]) -> str:
        """The host's reply. Raises ValueError for a host that does not answer as it should."""
        address = os.environ[JUDGE_VARIABLE].rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY_VARIABLE)) else {})
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                data = response.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise ValueError(f"the judge answered with status {error.code}") from None
        except OSError as error:
            raise ValueError(f"the judge cannot be reached: {getattr(error, 'reason', None) or error}") from None
        try:
            return str(json.loads(data)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError("the judge's response is not that of an OpenAI-compatible host") from None


def _number(reply: str) -> float:
    """The first number of a reply. Raises ValueError for one that is not from 0 to 10."""
    found = _NUMBER.search(reply)
    if found is None or float(found[0]) > 10:
        raise ValueError(f"the judge replied {reply[:80]!r}, not a number from 0 to 10")
    return float(found[0])


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the named host alone."""

    def redirect_request(self, *_: Any) -> None:
        return None
