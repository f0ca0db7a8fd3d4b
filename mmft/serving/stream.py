"""An answer as it grows: generation in a thread, its text piece by piece, stopped when nobody listens any more."""

from __future__ import annotations

from collections.abc import Generator
from threading import Event, Thread
from typing import Any


def stream(evaluator: Any, model: Any, samples: list[Any]) -> Generator[str, None, None]:
    """The text so far, again and again; the last one is exactly what `Evaluator.answer` gives for this one sample.

    With more than one beam there is no text before the end, so only that last one comes. Errors raised: UserError.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    inputs = evaluator.collator.prompt(samples)
    if (evaluator.generation.get("num_beams") or 1) > 1:
        yield evaluator.answer(model, inputs)[0]
        return
    streamer = TextIteratorStreamer(evaluator.collator.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop, result, failure = Event(), [], []

    def stopped(ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)

    def work() -> None:
        try:
            result.extend(evaluator.answer(model, inputs, streamer=streamer, stopping_criteria=StoppingCriteriaList([stopped])))
        except BaseException as error:  # raised again where the text is read
            failure.append(error)
        finally:
            streamer.end()

    thread = Thread(target=work, daemon=True)
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
    yield result[0]
