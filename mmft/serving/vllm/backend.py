"""backend=vllm from its start to its end: runs are checked, transformers answers some held-out rows, vLLM takes over and has to answer the same."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ...common.errors import UserError
from ...config.guard.remote_code import trusts_remote_code
from ...data.sample import Sample
from ...runs.open import OpenedRun
from ...system.distributed import world_size
from .. import parity
from ..adapters import ServedModel, open_models
from .answers import AdaptedModel, VllmEvaluator, VllmModel, without_end
from .plan import check_architecture, plan
from .process import Completed, Vllm, interpreter
from .prompts import sampling

if TYPE_CHECKING:
    from ...collators.types import BatchMaker

log = logging.getLogger("mmft")
TOP = 5  # likeliest tokens at each place that are compared where answers differ
# Two tokens are as likely as each other if their logits differ by no more than two steps of the precision between 16 and 32, where large logits lie:
# there, kernels that add in another order round to either side. fp32 has its own, far smaller noise.
TIES = {"bfloat16": 2 * 2.0**-3, "float16": 2 * 2.0**-6, "float32": 1e-3}


@dataclass(frozen=True)
class Served:
    """vllm: runs until the block ends. models: whose `opened` answers through it."""

    vllm: Vllm
    models: list[ServedModel]


@contextmanager
def served_by_vllm(paths: Sequence[str], cfg: DictConfig, overrides: list[str], checkpoint: int | None, keys: Any, rows: int) -> Iterator[Served]:
    """The base and its runs on vLLM, for the block; no paths: the model of model=... alone.

    keys: of vLLM's EngineArgs. rows: held-out rows of each model whose answers are compared with transformers'; 0: none. Raises UserError for runs that
    vLLM would compute otherwise, before weights are read, and for answers that differ.
    """
    if world_size() > 1:
        raise UserError("backend=vllm: start it in one process; vLLM itself takes several GPUs: vllm={tensor_parallel_size:2}")
    made = plan(paths, cfg, overrides, checkpoint, keys)
    interpreter()
    models = open_models(paths, cfg, overrides, checkpoint)
    opened = models[-1].opened
    check_architecture(opened.model.config, made.adapters)
    for served in models:
        check_settings(served.opened)
    expected = {served.name: chosen if isinstance(chosen := parity.held_out(served, rows), str) else expect(served, chosen) for served in models} if rows else {}
    weights = opened.weights if opened.weights is not None and not made.adapters else Path(opened.loaded.located.folder)
    dtype = str(opened.loaded.dtype).removeprefix("torch.")
    arguments = made.arguments(weights, dtype, opened.settings["seed"], opened.family.processor, trusts_remote_code())
    generation, config = opened.model.generation_config.to_diff_dict(), opened.model.config
    release(models)
    log.info("%-14s starts with %s", "vllm", ", ".join(f"{k}={v}" for k, v in arguments.items() if k not in ("model", "disable_log_stats", "generation_config")))
    vllm = Vllm(arguments, made.adapters, made.uneven)
    try:
        for served in models:
            adapter = served.name if served.name in made.adapters else None
            kind = VllmModel if adapter is None else AdaptedModel
            maker = partial(VllmEvaluator, seed=served.opened.settings["seed"])
            served.opened = replace(served.opened, model=kind(vllm, adapter, config, generation), maker=maker, backend=f"vllm {vllm.version}")
        for served in models:
            if rows:
                log.info("%-14s %s", "checked", compare(served, expected[served.name], TIES.get(dtype, 0.0)))
        yield Served(vllm, models)
    finally:
        vllm.close()


def check_settings(opened: OpenedRun) -> None:
    """Raises UserError for settings of a run that vLLM has no counterpart for."""
    if opened.settings["evaluation"].get("answer", "generate") == "choose":
        raise UserError("evaluation.answer=choose: backend=vllm generates answers and does not choose; use backend=transformers")
    sampling(opened.settings["generation"], opened.model.generation_config.to_diff_dict(), opened.collator.end_ids)


def release(models: Sequence[ServedModel]) -> None:
    """Free the weights that transformers has loaded: vLLM takes most of a GPU."""
    for served in models:
        served.opened.loaded = replace(served.opened.loaded, model=None)  # what asks for it from here on asks vLLM
        served.opened.model = None
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the same answers -----------------------------------------------------------------------------------------------


def expect(served: ServedModel, rows: Sequence[Sample]) -> tuple[Sequence[Sample], list[str]]:
    """(rows, transformers' greedy answers to them)."""
    evaluator = greedy(served.opened, rows)
    with served.use() as model:
        return rows, [answer.text for answer in evaluator.generate(model)]


def greedy(opened: OpenedRun, rows: Sequence[Sample]) -> Any:
    evaluator = opened.evaluator(rows)
    evaluator.generation = {**evaluator.generation, "do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
    evaluator.chooser, evaluator.progress, evaluator.announce = None, False, False
    return evaluator


def compare(served: ServedModel, expected: tuple[Sequence[Sample], list[str]] | str, tie: float) -> str:
    """A line about a model: that vLLM answers as transformers did. Raises UserError for a row that it answers otherwise.

    Two answers may part where the two likeliest tokens are as likely as each other: to `tie`, in log-probability.
    """
    if isinstance(expected, str):
        return f"{served.name}: not compared with transformers: {expected}"
    rows, texts = expected
    evaluator, ties = greedy(served.opened, rows), 0
    for index, done in evaluator.completed(served.opened.model, rows, logprobs=TOP):
        if isinstance(done, UserError):
            raise done
        text = served.collator.decode([without_end(done, served.collator.end_ids)])[0]
        if text == texts[index]:
            continue
        if not parts_at_a_tie(done, texts[index], served.collator, tie):
            raise UserError(
                f"run={served.name}: vLLM answers row {rows[index].id} with {text[:200]!r} where transformers answers {texts[index][:200]!r}; nothing is answered by it"
                " (check=0 leaves this check out; please report it)"
            )
        ties += 1
    same = f"{len(texts) - ties} held-out rows answered as transformers does"
    return f"{served.name}: {same}{f', {ties} part from it where two tokens are equally likely' if ties else ''}"


def parts_at_a_tie(done: Completed, expected: str, collator: BatchMaker, tie: float) -> bool:
    """Whether an answer leaves the expected text at a token beside which another, as likely one goes on with it, or ends it."""
    ends = collator.end_ids
    for place, top in enumerate(done.logprobs):
        chosen, before = done.ids[place], done.ids[:place]
        if chosen not in ends and expected.startswith(collator.decode([[*before, chosen]])[0]):
            continue
        ours = dict(top)
        return any(
            abs(ours[chosen] - value) <= tie and (expected == collator.decode([before])[0] if token in ends else expected.startswith(collator.decode([[*before, token]])[0]))
            for token, value in top if token != chosen and chosen in ours
        )  # fmt: skip
    return False

