"""vLLM's process as mmft sees it: start it, hand it requests, hand out what it writes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ...common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

K = TypeVar("K")
VARIABLE = "MMFT_VLLM"  # the python, or the folder, of vLLM's environment; from the environment, because a config cannot name a program to start
IN_FLIGHT = 256  # requests that have been handed over and not answered; their images lie in files
GRACE = 20  # seconds in which the process may end by itself


@dataclass(frozen=True)
class Request:
    """tokens: the prompt with one placeholder for each image. adapter: its name, None for the base. sampling: keys of vLLM's SamplingParams."""

    tokens: Sequence[int]
    images: Sequence[Image.Image]
    adapter: str | None
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Output:
    """What is new of an answer. prompt: the prompt's ids as vLLM has expanded them, in the first output. finish: stop | length | error, in the last one.

    logprobs: for each new token the likeliest ones with theirs. prompt_logprobs: of each token of the prompt. error: why there is no answer.
    """

    new: Sequence[int] = ()
    prompt: Sequence[int] | None = None
    logprobs: Sequence[Sequence[tuple[int, float]]] | None = None
    prompt_logprobs: Sequence[float | None] | None = None
    finish: str | None = None
    error: str = ""


@dataclass
class Completed:
    """A whole answer; fields as those of Output."""

    ids: list[int] = field(default_factory=list)
    prompt: Sequence[int] = ()
    logprobs: list[Sequence[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: Sequence[float | None] = ()
    finish: str = ""

    def add(self, output: Output) -> None:
        self.ids += output.new
        self.logprobs += output.logprobs or []
        self.prompt = output.prompt if output.prompt is not None else self.prompt
        self.prompt_logprobs = output.prompt_logprobs if output.prompt_logprobs is not None else self.prompt_logprobs
        self.finish = output.finish or ""


@dataclass(frozen=True)
class Pipes:
    """The two ends of a worker. end: waits for it, or ends it. log: what it has printed."""

    commands: IO[str]
    replies: IO[str]
    end: Callable[[], None]
    log: Path | None = None


def interpreter() -> str:
    """The python that has vLLM: of the environment that MMFT_VLLM names, else this one. Raises UserError."""
    given = os.environ.get(VARIABLE)
    if not given:
        if find_spec("vllm") is None:
            raise UserError(
                f"backend=vllm: vLLM is not installed here: pip install 'mmft[vllm]', or give it an environment of its own and name that: {VARIABLE}=ENV"
            )
        return sys.executable
    path = Path(given).expanduser()
    found = next((p for p in (path, path / "bin" / "python", path / "Scripts" / "python.exe") if p.is_file() and os.access(p, os.X_OK)), None)
    if found is None:
        raise UserError(f"{VARIABLE}={given}: holds no python; name the folder of an environment, or its python")
    return str(found)


def launch() -> Pipes:
    """Start the worker. Raises UserError."""
    python = interpreter()
    # where this environment's modules lie is no matter of another's
    environment = {k: v for k, v in os.environ.items() if python == sys.executable or k not in ("PYTHONPATH", "PYTHONHOME")}
    handle, name = tempfile.mkstemp(prefix="mmft-vllm-", suffix=".log")
    try:
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("worker.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=handle,
            env=environment, text=True, encoding="utf-8", start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )  # fmt: skip
    finally:
        os.close(handle)
    assert process.stdin is not None and process.stdout is not None

    def end() -> None:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()

    return Pipes(process.stdin, process.stdout, end, Path(name))


class Vllm:
    """A started vLLM. version: of the library. context: tokens that a prompt and its answer may have."""

    def __init__(self, arguments: Mapping[str, Any], adapters: Mapping[str, Path], uneven: str | None = None):
        """Start it and wait until it is ready. Raises UserError with the reason that it gave.

        uneven: name of an adapter whose modules differ in rank or alpha, if there is one.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="mmft-vllm-"))
        self._pipes = launch()
        self._writing = threading.Lock()
        self._listeners: dict[str, Callable[[Output], None]] = {}
        self._numbers = itertools.count()
        self._ready: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._broken = ""
        self._closed = False
        self._reader = threading.Thread(target=self._read, name="mmft-vllm", daemon=True)
        self._reader.start()
        try:
            self._say({"engine": dict(arguments), "adapters": {name: str(folder.resolve()) for name, folder in adapters.items()}, "uneven": uneven})
            ready = self._ready.get()
        except BaseException:
            self.close()
            raise
        if "error" in ready:
            self.close()
            raise UserError(ready["error"])
        self.version, self.context = str(ready["version"]), int(ready["context"])

    def submit(self, request: Request, listener: Callable[[Output], None]) -> str:
        """Hand over a request; its outputs go to `listener`, in a thread of this object. Returns the name of the request. Raises UserError."""
        name = f"r{next(self._numbers)}"
        images = []
        for number, image in enumerate(request.images):
            file = self._folder / f"{name}-{number}"
            file.write_bytes(image.convert("RGB").tobytes())
            images.append({"file": str(file), "width": image.width, "height": image.height})
        self._listeners[name] = listener
        try:
            if self._broken:  # after the listener is known: whoever finds the process broken tells all listeners
                raise UserError(self._broken)
            self._say({"add": {"id": name, "tokens": list(request.tokens), "images": images, "adapter": request.adapter, "sampling": dict(request.sampling)}})
        except UserError:
            if self._listeners.pop(name, None) is not None:  # else the listener has been told
                raise
        return name

    def abort(self, name: str) -> None:
        """Forget a request; nothing more comes to its listener."""
        if self._listeners.pop(name, None) is not None and not self._broken:
            with contextlib.suppress(UserError):
                self._say({"abort": [name]})

    def complete(self, requests: Iterable[tuple[K, Request]]) -> Iterator[tuple[K, Completed]]:
        """(key, whole answer) of every request, in the order in which the answers end. Raises UserError for one that is refused."""
        arrived: queue.SimpleQueue[tuple[K, Output]] = queue.SimpleQueue()
        coming = iter(requests)
        done: dict[K, Completed] = {}
        names: dict[K, str] = {}

        def hand_over() -> None:
            for key, request in itertools.islice(coming, IN_FLIGHT - len(done)):
                done[key] = Completed()
                names[key] = self.submit(request, lambda output, key=key: arrived.put((key, output)))  # type: ignore[misc]  # mypy knows no defaults of lambdas

        try:
            hand_over()
            while done:
                key, output = arrived.get()
                if output.error:
                    raise UserError(output.error)
                done[key].add(output)
                if output.finish is not None:
                    names.pop(key)
                    yield key, done.pop(key)
                    hand_over()
        finally:
            for name in names.values():
                self.abort(name)

    def close(self) -> None:
        """End the process. What it has printed is deleted, unless it broke down."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError, ValueError):
            self._pipes.commands.close()
        self._pipes.end()
        self._reader.join(GRACE)
        with contextlib.suppress(OSError, ValueError):
            self._pipes.replies.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._pipes.log is not None and not self._broken:
            self._pipes.log.unlink(missing_ok=True)

    def _say(self, message: dict[str, Any]) -> None:
        with self._writing:
            try:
                self._pipes.commands.write(json.dumps(message) + "\n")
                self._pipes.commands.flush()
            except (OSError, ValueError):
                raise UserError(self._broken or self._reason("it ended")) from None

    def _read(self) -> None:
        reason = ""
        with contextlib.suppress(OSError, ValueError):  # of a pipe that was closed
            for line in self._pipes.replies:
                message = json.loads(line)
                if "out" in message:
                    out = message["out"]
                    name = out.pop("id")
                    listener = self._listeners.get(name)
                    if out["finish"] is not None:
                        self._listeners.pop(name, None)
                    if out["finish"] in ("abort", "error"):  # by vLLM; a listener that gave its request up is known no more
                        out = {"error": "backend=vllm: vLLM gave a request up", "finish": "error"}
                    if listener is not None:
                        listener(Output(**out))
                elif "failed" in message:
                    listener = self._listeners.pop(message["failed"]["id"], None)
                    if listener is not None:
                        listener(Output(error=f"backend=vllm: vLLM refuses this request: {message['failed']['reason']}", finish="error"))
                elif "ready" in message:
                    self._ready.put(message["ready"])
                else:
                    reason = str(message.get("error"))
        if not self._closed:
            self._broken = self._reason(reason or "it ended without a word")
            self._ready.put({"error": self._broken})
            for name in list(self._listeners):
                if (listener := self._listeners.pop(name, None)) is not None:
                    listener(Output(error=self._broken, finish="error"))

    def _reason(self, reason: str) -> str:
        return f"backend=vllm: vLLM failed: {reason}{f' (all it said is in {self._pipes.log})' if self._pipes.log is not None else ''}"
