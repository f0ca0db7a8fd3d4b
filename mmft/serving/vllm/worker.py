"""The process that holds vLLM. It runs as a script, in vLLM's own environment, and imports nothing of mmft.

It reads one JSON object a line from stdin and writes the same to what was stdout; everything that libraries print goes to stderr.

    {"engine": {EngineArgs}, "adapters": {name: folder}, "uneven"}  first; answered by {"ready": {"version", "context"}}
    {"add": {"id", "tokens", "images", "adapter", "sampling"}}      answered by {"out": {...}} until its "finish", or by {"failed": {"id", "reason"}}
    {"abort": [id, ...]}

`uneven` names an adapter whose modules differ in rank or alpha, or is null. {"error": reason} ends the process, as does the end of stdin. An image is {"file", "width", "height"}: a file of RGB bytes, which is deleted when it has been read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import sys
import threading
from typing import Any, TextIO


def serve(commands: TextIO, replies: TextIO) -> int:
    """Answer commands until there are no more; returns the exit code."""

    def say(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    first = json.loads(commands.readline() or "{}")
    if not first:
        return 0
    try:
        engine = started(first["engine"], first["uneven"])
    except (Exception, SystemExit) as error:
        say(error=one_line(error))
        return 1
    adapters = {name: (number, folder) for number, (name, folder) in enumerate(first["adapters"].items(), 1)}
    import vllm

    say(ready={"version": str(vllm.__version__), "context": engine.model_config.max_model_len})
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in commands:
            waiting.put(json.loads(line))
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    told: set[str] = set()
    while True:
        busy = engine.has_unfinished_requests()
        try:
            command = waiting.get(block=not busy)
        except queue.Empty:
            command = {}
        if command is None:
            return 0
        if "add" in command:
            asked = command["add"]
            try:
                add(engine, asked, adapters)
            except Exception as error:  # a request that vLLM refuses leaves the others alone
                say(failed={"id": asked["id"], "reason": one_line(error)})
            continue
        if "abort" in command:
            engine.abort_request(command["abort"])
            continue
        try:
            outputs = engine.step()
        except Exception as error:
            say(error=one_line(error))
            return 1
        for output in outputs:
            say(out=described(output, first=output.request_id not in told))
            told.add(output.request_id)
            if output.finished:
                told.discard(output.request_id)


def started(arguments: dict[str, Any], uneven: str | None) -> Any:
    """vLLM's engine. Raises whatever it raises, and ValueError for an argument that it does not have and for an adapter that it would scale wrongly."""
    from vllm import EngineArgs, LLMEngine
    from vllm.lora.peft_helper import PEFTHelper

    if uneven is not None and not hasattr(PEFTHelper, "get_rank_and_scaling"):  # 0.30 has not, 0.33 has
        raise ValueError(f"this vLLM takes one rank and one alpha for all modules of an adapter, and that of {uneven} has several; merge it (mmft merge), or take a newer vLLM")

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown := [key for key in arguments if key not in known]:
        raise ValueError(f"EngineArgs of this vLLM has no {unknown[0]}")
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def add(engine: Any, asked: dict[str, Any], adapters: dict[str, tuple[int, str]]) -> None:
    """Hand one request to the engine."""
    from PIL import Image
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    images = []
    for image in asked["images"]:
        with open(image["file"], "rb") as file:
            images.append(Image.frombytes("RGB", (image["width"], image["height"]), file.read()))
        os.unlink(image["file"])
    prompt: dict[str, Any] = {"prompt_token_ids": asked["tokens"], **({"multi_modal_data": {"image": images}} if images else {})}
    adapter = None
    if asked["adapter"] is not None:
        number, folder = adapters[asked["adapter"]]
        adapter = LoRARequest(lora_name=asked["adapter"], lora_int_id=number, lora_path=folder)
    parameters = SamplingParams(**asked["sampling"], detokenize=False, output_kind=RequestOutputKind.DELTA)
    engine.add_request(asked["id"], prompt, parameters, lora_request=adapter)


def described(output: Any, first: bool) -> dict[str, Any]:
    """A RequestOutput as plain values: the tokens that are new, and in the first one the prompt as vLLM has expanded it."""
    [new] = output.outputs
    found: dict[str, Any] = {"id": output.request_id, "new": list(new.token_ids), "finish": new.finish_reason}
    if first:
        found["prompt"] = list(output.prompt_token_ids)
    if new.logprobs is not None:
        found["logprobs"] = [sorted(([token, value.logprob] for token, value in place.items()), key=lambda pair: -pair[1]) for place in new.logprobs]
    if output.prompt_logprobs:
        pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        found["prompt_logprobs"] = [None if place is None else place[token].logprob for token, place in pairs]
    return found


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:500]}" if lines else type(error).__name__


def main() -> int:
    if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        sys.path.pop(0)  # the files beside this one are no modules of vLLM's environment
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return serve(sys.stdin, replies)


if __name__ == "__main__":
    sys.exit(main())
