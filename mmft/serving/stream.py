"""Stream an answer: generate in a thread, yield the text as it grows, stop when the consumer stops."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from ..data.sample import Sample
from ..evaluation.evaluate import Answer, Evaluator

if TYPE_CHECKING:
    import torch


def stream(evaluator: Evaluator, model: torch.nn.Module, samples: Sequence[Sample]) -> Generator[str, None, None]:
    """Yield the text so far, repeatedly; the last text equals what `Evaluator.answer` returns for this one sample.

    With more than one beam only the last text is yielded. Raises UserError.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    inputs = evaluator.collator.prompt(samples)
    if (evaluator.generation.get("num_beams") or 1) > 1:
        yield evaluator.answer(model, inputs)[0].text
        return
    streamer = TextIteratorStreamer(evaluator.collator.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop = Event()
    result: list[Answer] = []
    failure: list[BaseException] = []

    def stopped(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        import torch

        return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)

    def generate() -> None:
        try:
            result.extend(evaluator.answer(model, inputs, streamer=streamer, stopping_criteria=StoppingCriteriaList([stopped])))
        except BaseException as error:  # raised again in the consumer's thread
            failure.append(error)
        finally:
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            if piece:
                yield text.lstrip()
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]
    yield result[0].text
