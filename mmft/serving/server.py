"""The HTTP side of `mmft serve`: OpenAI's /v1/models and /v1/chat/completions, and errors as OpenAI's clients expect them.

It listens on 127.0.0.1, or on another address that the command names, and then only with a token. It fetches no URL and opens no file that a
request names. A page of another site cannot use it from a browser: it answers to its own address only, reads application/json only, and
sends no CORS headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .chat_request import MAX_BODY, ChatRequest, RequestError, parse
from .engine import AnswerEngine, no_such_model
from .jobs import Job, Piece, TokenInfo
from .listener import LOCAL

DRAINED = 8 * MAX_BODY  # bytes of a refused request that are read and dropped, so that its client gets the answer
MOST_READ = 4 * MAX_BODY  # bytes of requests that are read at the same time

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# The description of a request for /openapi.json; `parse` reads it.
REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["role", "content"],
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant"]},
                "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"anyOf": [
                    {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
                    {"type": "object", "required": ["type", "image_url"], "properties": {"type": {"const": "image_url"}, "image_url": {
                        "type": "object", "required": ["url"], "properties": {"url": {"type": "string", "pattern": "^data:image/"}}}}},
                ]}}]},
            },
        }},
        "max_tokens": {"type": "integer", "minimum": 1}, "max_completion_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2}, "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "seed": {"type": "integer"}, "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]},
        "stream": {"type": "boolean"}, "stream_options": {"type": "object"}, "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    },
}  # fmt: skip


class Server:
    """The application over an engine. token: what clients send as `Authorization: Bearer TOKEN`; None for no check."""

    def __init__(self, engine: AnswerEngine, token: str | None = None, local: bool = True):
        self.engine, self.token, self.local = engine, token, local
        self.started = int(time.time())
        self.folder = Path(tempfile.mkdtemp(prefix="mmft-serve-"))
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="mmft-read")  # decoding many images at once would fill the memory
        self.being_read = 0
        self.tokenizers = {name: served.collator.tokenizer for name, served in engine.models.items()}

    def close(self) -> None:
        self.readers.shutdown(cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def app(self) -> FastAPI:
        app = FastAPI(title="mmft serve", docs_url=None, redoc_url=None)

        def failed(request: Request, error: Exception) -> JSONResponse:
            assert isinstance(error, RequestError)
            return JSONResponse(error.body(), error.status, {"Retry-After": "5"} if error.status == 429 else None)

        def refused(request: Request, error: Exception) -> JSONResponse:
            assert isinstance(error, HTTPException)
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
            return JSONResponse(RequestError(error.status_code, str(error.detail), code).body(), error.status_code, error.headers)

        app.add_exception_handler(RequestError, failed)
        app.add_exception_handler(HTTPException, refused)

        @app.get("/health")
        async def health() -> dict[str, Any]:
            return {"status": "ok", "waiting": self.engine.waiting}

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [self._model(name) for name in self.engine.models]}

        @app.get("/v1/models/{model:path}", responses={404: {"description": "no such model"}})
        async def model(model: str) -> dict[str, Any]:
            if model not in self.engine.models:
                raise no_such_model(model, self.engine.models)
            return self._model(model)

        named = {**REQUEST_SCHEMA, "properties": {**REQUEST_SCHEMA["properties"], "model": {"enum": list(self.engine.models)}}}
        described = {"requestBody": {"required": True, "content": {"application/json": {"schema": named}}}}
        errors: dict[int | str, dict[str, Any]] = {
            code: {"description": text} for code, text in ((400, "a request that cannot be answered"), (404, "no such model"), (413, "too large"), (415, "not JSON"), (429, "busy"))
        }

        @app.post("/v1/chat/completions", openapi_extra=described, responses=errors)
        async def completions(request: Request) -> Response:
            return await self._complete(request)

        app.add_middleware(Gate, server=self)
        return app

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "mmft"}

    # --- one request --------------------------------------------------------------------------------------------

    async def _complete(self, request: Request) -> Response:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        folder = self.folder / name
        loop = asyncio.get_running_loop()
        try:
            body = await self._body(request)
            self.being_read += len(body)
            try:
                asked = await loop.run_in_executor(self.readers, parse, body, folder, "this request")
            finally:
                self.being_read -= len(body)
            pieces: asyncio.Queue[Piece] = asyncio.Queue()

            def listener(piece: Piece) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            job = Job(asked, listener)
            self.engine.submit([job])
            try:
                first = await self._next(pieces, request)
            except BaseException:
                job.cancelled.set()
                raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if asked.stream:
            return StreamingResponse(self._stream(name, asked, job, pieces, first, folder), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            everything = [first]
            while everything[-1].finish is None:
                everything.append(await self._next(pieces, request))
            return JSONResponse(self._answer(name, asked, job, everything))
        finally:
            job.cancelled.set()
            shutil.rmtree(folder, ignore_errors=True)

    async def _body(self, request: Request) -> bytes:
        """The body. Raises RequestError; a body that is too large is dropped while it comes."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "the request must be application/json", "unsupported_media_type")
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                self.being_read += len(part)
                if size <= MAX_BODY and self.being_read <= MOST_READ:
                    parts.append(part)
                else:
                    parts.clear()
                if size > DRAINED:
                    break
        finally:
            self.being_read -= size
        if size > MAX_BODY:
            raise RequestError(413, f"the request is larger than {MAX_BODY >> 20} MB", "request_too_large")
        body = b"".join(parts)
        if len(body) < size:
            raise RequestError(429, "too many large requests are coming in; try again later", "rate_limit_exceeded")
        return body

    async def _next(self, pieces: asyncio.Queue[Piece], request: Request) -> Piece:
        """The next piece. Raises RequestError, also for a client that has gone."""
        while True:
            try:
                piece = await asyncio.wait_for(pieces.get(), 0.5)
            except (TimeoutError, asyncio.TimeoutError):
                if await request.is_disconnected():
                    raise RequestError(499, "the client closed the connection", "client_closed_request") from None
                continue
            if piece.error is not None:
                raise piece.error
            return piece

    async def _stream(self, name: str, asked: ChatRequest, job: Job, pieces: asyncio.Queue[Piece], first: Piece, folder: Path) -> AsyncIterator[str]:
        """Server-sent events. Starlette ends this generator when the client closes the connection."""

        def event(delta: dict[str, Any], finish: str | None = None, tokens: Sequence[TokenInfo] = ()) -> str:
            choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": self._logprobs(asked, tokens)}
            return _event({**self._head(name, asked, "chat.completion.chunk"), "choices": [choice], **({"usage": None} if asked.usage else {})})

        try:
            yield event({"role": "assistant", "content": ""})
            piece = first
            while True:
                delta = {**({"reasoning_content": piece.reasoning} if piece.reasoning else {}), **({"content": piece.text} if piece.text else {})}
                if delta or piece.tokens:
                    yield event(delta, tokens=piece.tokens)
                if piece.finish is not None:
                    yield event({}, piece.finish)
                    break
                piece = await pieces.get()
                if piece.error is not None:
                    yield _event(piece.error.body())
                    return
            if asked.usage:
                yield _event({**self._head(name, asked, "chat.completion.chunk"), "choices": [], "usage": _usage(job)})
            yield "data: [DONE]\n\n"
        finally:
            job.cancelled.set()
            shutil.rmtree(folder, ignore_errors=True)

    def _head(self, name: str, asked: ChatRequest, kind: str) -> dict[str, Any]:
        return {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}

    def _answer(self, name: str, asked: ChatRequest, job: Job, pieces: Sequence[Piece]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None}
        if reasoning := "".join(p.reasoning for p in pieces):
            message["reasoning_content"] = reasoning
        tokens = [token for piece in pieces for token in piece.tokens]
        choice = {"index": 0, "message": message, "finish_reason": pieces[-1].finish, "logprobs": self._logprobs(asked, tokens)}
        return {**self._head(name, asked, "chat.completion"), "choices": [choice], "usage": _usage(job)}

    def _logprobs(self, asked: ChatRequest, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if asked.settings.top_logprobs is None:
            return None
        tokenizer = self.tokenizers[asked.model]

        def shown(token: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8"))}

        return {"content": [{**shown(t.token, t.logprob), "top_logprobs": [shown(*pair) for pair in t.top]} for t in tokens], "refusal": None}


class Gate:
    """Lets requests through that come to this server's own address and bring its token; ASGI middleware."""

    def __init__(self, app: Any, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        error = self._why_not(headers)
        if error is None:
            await self.app(scope, receive, send)
            return
        body = json.dumps(error.body()).encode()
        await send({"type": "http.response.start", "status": error.status, "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})

    def _why_not(self, headers: dict[str, str]) -> RequestError | None:
        if self.server.local and _host_of(headers.get("host", "")) not in LOCAL:  # a name of another site that resolves to this machine
            return RequestError(403, "this server answers to 127.0.0.1 and localhost only", "wrong_host")
        if self.server.token is not None:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.server.token.encode("utf-8")):
                return RequestError(401, "the token is missing or wrong; send it as the API key (Authorization: Bearer TOKEN)", "invalid_api_key")
        return None


def _host_of(host: str) -> str:
    """A Host header without its port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host


def _usage(job: Job) -> dict[str, int]:
    return {"prompt_tokens": job.prompt_tokens, "completion_tokens": job.written, "total_tokens": job.prompt_tokens + job.written}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@contextlib.contextmanager
def background(server: Server, listener: socket.socket) -> Iterator[str]:
    """Serve from a thread inside the block; yields the address."""
    web = uvicorn.Server(uvicorn.Config(server.app(), log_config=None, log_level="critical", access_log=False, lifespan="off", server_header=False))
    thread = threading.Thread(target=lambda: asyncio.run(web.serve(sockets=[listener])), name="mmft-server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        web.should_exit = True
        thread.join(10)
        server.close()


def run(server: Server, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(server.app(), log_config=None, log_level="critical", access_log=False, lifespan="off", timeout_graceful_shutdown=3, server_header=False)
    web = uvicorn.Server(config)
    try:
        web.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again after it has ended
        pass
    finally:
        listener.close()
