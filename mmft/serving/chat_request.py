"""One request of OpenAI's chat completions as a sample of mmft and the settings of its answer."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data.images import MAX_PIXELS, ImageError, decode, is_image
from ..data.row_checks import problem
from ..data.sample import Message, Part, Row, Sample, assistant_turn, text_part
from ..evaluation.inputs import UNKNOWN_ANSWER

MAX_IMAGE = 64 * 2**20  # bytes of one image file, as on the page of `mmft compare ui=true`
MAX_BODY = 96 * 2**20  # bytes of a request: an image of MAX_IMAGE in base64, and its text
MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)

# Keys that ask for what this server does not do, with the values that ask for nothing; and keys that change nothing here.
NOT_OFFERED: dict[str, tuple[object, ...]] = {
    "n": (1,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "audio": (), "modalities": (["text"],), "prediction": (), "web_search_options": (),
    "reasoning_effort": (), "verbosity": (),
}  # fmt: skip
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
KNOWN = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs"}


class RequestError(Exception):
    """What OpenAI's clients raise as an APIStatusError: an HTTP status, a code, and the key that is meant."""

    def __init__(self, status: int, message: str, code: str = "invalid_value", param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def kind(self) -> str:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class AnswerSettings:
    """What a request says about its answer. None: as the run's own settings say. top_logprobs: None if no log-probabilities are wanted."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """model: as the request names it."""

    model: str
    sample: Sample
    settings: AnswerSettings
    stream: bool = False
    usage: bool = False


def parse(body: bytes, folder: Path, name: str) -> ChatRequest:
    """Read a request; its images are written into `folder`. name: of the request, in messages. Raises RequestError."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not valid JSON", "invalid_json") from None
    if not isinstance(given, dict):
        raise RequestError(400, "the body must be a JSON object", "invalid_type")
    for key, value in given.items():
        if key in NOT_OFFERED and value is not None and value not in NOT_OFFERED[key]:
            raise RequestError(400, f"{key} is not supported by this server", "unsupported_parameter", key)
        if key not in KNOWN and key not in NOT_OFFERED and key not in IGNORED:
            raise RequestError(400, f"Unrecognized request argument supplied: {str(key)[:80]}", "unknown_parameter", str(key)[:80])
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError(400, "model must be the name of a model; GET /v1/models lists them", "missing_required_parameter", "model")
    settings = _settings(given)
    options = given.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise RequestError(400, "stream_options must be an object", "invalid_type", "stream_options")
    usage = _boolean(options.get("include_usage"), "stream_options.include_usage")
    stream = _boolean(given.get("stream"), "stream")
    return ChatRequest(model, _sample(given.get("messages"), folder, name), settings, stream, usage)


def _settings(given: Mapping[str, Any]) -> AnswerSettings:
    limits = [_number(given.get(key), key, 1, 10**6, whole=True) for key in ("max_completion_tokens", "max_tokens")]
    limit = next((int(each) for each in limits if each is not None), None)
    seed = _number(given.get("seed"), "seed", -(2**63), 2**63 - 1, whole=True)
    top = _number(given.get("top_logprobs"), "top_logprobs", 0, MOST_TOP_LOGPROBS, whole=True)
    wanted = _boolean(given.get("logprobs"), "logprobs")
    if top is not None and not wanted:
        raise RequestError(400, "top_logprobs goes with logprobs=true", "invalid_value", "top_logprobs")
    stop = given.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(each, str) and 0 < len(each) <= 256 for each in stops):
        raise RequestError(400, f"stop must be a text, or a list of at most {MOST_STOPS} texts of 1 to 256 characters", "invalid_value", "stop")
    return AnswerSettings(
        limit, _number(given.get("temperature"), "temperature", 0, 2), _number(given.get("top_p"), "top_p", 0, 1, above=True),
        None if seed is None else int(seed), tuple(stops), int(top or 0) if wanted else None,
    )  # fmt: skip


def _number(value: Any, key: str, low: float, high: float, whole: bool = False, above: bool = False) -> float | int | None:
    if value is None:
        return None
    kind = "whole number" if whole else "number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise RequestError(400, f"{key} must be a {kind}", "invalid_type", key)
    if not (low < value if above else low <= value) or not value <= high:
        raise RequestError(400, f"{key} must be a {kind} {'above' if above else 'from'} {low} to {high}", "invalid_value", key)
    return value


def _boolean(value: Any, key: str) -> bool:
    if not isinstance(value, (bool, type(None))):
        raise RequestError(400, f"{key} must be true or false", "invalid_type", key)
    return bool(value)


# --- messages -------------------------------------------------------------------------------------------------------


def _sample(messages: Any, folder: Path, name: str) -> Sample:
    """The conversation with a placeholder for the answer. Raises RequestError."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list of at least one message", "invalid_type", "messages")
    read: list[Message] = []
    images: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise RequestError(400, f"{where} must be an object with role and content", "invalid_type", where)
        role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
        if role not in ("system", "user", "assistant"):
            raise RequestError(400, f"{where}.role must be system, user or assistant", "invalid_value", f"{where}.role")
        turn: Message = {"role": str(role), "content": _parts(message.get("content"), where, folder, images)}
        reasoning = message.get("reasoning_content")
        if role == "assistant" and isinstance(reasoning, str) and reasoning:
            turn["reasoning_content"] = reasoning
        read.append(turn)
    if read[-1]["role"] != "user":
        raise RequestError(400, "the last message must be the user's", "invalid_value", "messages")
    turns = [*read, assistant_turn(UNKNOWN_ANSWER)]
    reason = problem(Row(list(images), turns, [UNKNOWN_ANSWER], where=name), text_only=True)
    if reason is not None:
        raise RequestError(400, f"messages: {reason}", "invalid_value", "messages")
    return Sample(name, tuple(images), turns, (), folder.as_posix())


def _parts(content: Any, where: str, folder: Path, images: list[str]) -> list[Part]:
    if isinstance(content, str):
        return [text_part(_text(content, where))]
    if not isinstance(content, list) or not content:
        raise RequestError(400, f"{where}.content must be a text or a list of parts", "invalid_type", f"{where}.content")
    parts: list[Part] = []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(text_part(_text(part["text"], place)))
        elif kind == "image_url":
            parts.append({"type": "image"})
            images.append(_image(part.get("image_url"), place, folder, len(images)))
        else:
            raise RequestError(400, f"{place} must be {{type: text, text: ...}} or {{type: image_url, image_url: {{url: data:...}}}}", "invalid_value", place)
    return [part for part in parts if part["type"] != "text" or part["text"]] or [text_part("")]


def _text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(400, f"{where}: holds half of a surrogate pair, which is not a character", "invalid_value", where) from None
    return text


def _image(given: Any, where: str, folder: Path, number: int) -> str:
    """The name of the file with an image's bytes as they were sent. Raises RequestError."""
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url:
        raise RequestError(400, f"{where}.image_url must be {{url: data:image/...;base64,...}}", "invalid_type", f"{where}.image_url")
    head = _DATA_URL.match(url)
    if head is None:
        raise RequestError(400, f"{where}: only data:image/...;base64,... is read; this server never fetches a URL or opens a file of a request", "invalid_image_url", where)
    if (len(url) - head.end()) * 3 // 4 > MAX_IMAGE + 3:
        raise RequestError(413, f"{where}: the image is larger than {MAX_IMAGE >> 20} MB", "image_too_large", where)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, f"{where}: the image is not valid base64", "invalid_base64", where) from None
    if not is_image(data):
        raise RequestError(400, f"{where}: the data is not a picture in a known format", "invalid_image", where)
    try:
        decode(data, "", MAX_PIXELS)
    except ImageError as error:
        raise RequestError(400, f"{where}: {error.reason}", "invalid_image", where) from None
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{number}.img"
    (folder / name).write_bytes(data)
    return name


def body_of(model: str, sample: Sample, **keys: Any) -> dict[str, Any]:
    """The request that asks what a sample asks, its image files as data. Raises UserError for a sample that no request can express."""
    images: Sequence[Path] = sample.image_paths
    waiting = list(images)
    messages = []
    for message in sample.messages[:-1]:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image" and len(part) == 1:
                data = base64.b64encode(waiting.pop(0).read_bytes()).decode("ascii")
                content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
            elif part["type"] == "text" and not part.get("tokens"):
                content.append({"type": "text", "text": part["text"]})
            else:
                raise UserError(f"{sample.id}: has boxes or image sizes in its prompt, which a request cannot hold")
        messages.append({"role": message["role"], "content": content})
    return {"model": model, "messages": messages, **keys}
