"""Keep tokens and passwords out of files and messages. They are recognised by key, by form, and by comparison with the environment."""

from __future__ import annotations

import os
import re

from ...common.errors import UserError

# Names of keys and of environment variables whose values are secrets. `pad_token`, `max_new_tokens` and the like are not.
_SECRET_KEY = re.compile(r"(?i)(^|_)(api_?key|access_?key|secret|password|passwd|credentials?|private_?key)(_|$)|^(hub_|hf_|auth_|use_auth_|access_)?token$")
_SECRET_VARIABLE = re.compile(r"(?i)(token|api_?key|access_?key|secret|passw|credential|private_?key)")
_PASSWORD_IN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@:]*:[^\s/@]+@")
MIN_LENGTH = 8  # characters of a variable's value that is searched for; `1` or `true` would match everywhere


def known_secrets() -> dict[str, str]:
    """value -> name of the environment variables whose names say that they hold a secret."""
    return {value: name for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= MIN_LENGTH}


def redact(text: str) -> str:
    """The text without secrets of the environment and without passwords in URLs."""
    for value, name in sorted(known_secrets().items(), key=lambda item: -len(item[0])):
        text = text.replace(value, f"<{name}>")
    return _PASSWORD_IN_URL.sub(r"\1<password>@", text)


def check(node: object, where: str = "") -> None:
    """Refuse a config that contains a secret, which would be written into the run directory. Raises UserError without the secret."""
    if isinstance(node, dict):
        for key, value in node.items():
            name = f"{where}.{key}" if where else str(key)
            if value is not None and not isinstance(value, (dict, list)) and _SECRET_KEY.search(str(key)):
                raise _refusal(name, "is a secret, and a run keeps its config in files")
            check(value, name)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check(value, f"{where}[{i}]")
    elif isinstance(node, str):
        variable = next((name for value, name in known_secrets().items() if value in node), None)
        if variable is not None:
            raise _refusal(where, f"holds the value of ${variable}, and a run keeps its config in files")
        if _PASSWORD_IN_URL.search(node):
            raise _refusal(where, "holds a password in an address, and a run keeps its config in files")


def check_words(words: list[str]) -> None:
    """The same for the words of a command, before a message repeats any of them. Raises UserError."""
    for word in words:
        key, _, value = word.partition("=")
        key = key.lstrip("+")
        if value not in ("", "null") and _SECRET_KEY.search(key.split(".")[-1]):
            raise _refusal(key, "is a secret, and a run keeps its config in files")
        check(value, key)


def _refusal(where: str, why: str) -> UserError:
    return UserError(f"{where}: {why}; leave it out and log in instead (hf auth login, swanlab login; HF_TOKEN, SWANLAB_API_KEY)")
