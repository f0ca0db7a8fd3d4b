"""Where `mmft serve` listens, and who may ask: this machine, or others with a token."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec

from ..common.errors import UserError
from .page import HOST, free_port

TOKEN = "MMFT_SERVE_TOKEN"  # from the environment: values of a command are stored in files, and visible in the list of processes
MIN_TOKEN = 16  # characters; the server does not limit the rate of attempts
LOCAL = {"127.0.0.1", "localhost", "::1"}  # names under which this machine asks


def token_of(host: str) -> str | None:
    """The token that clients must send; None on 127.0.0.1 without one in the environment. Raises UserError."""
    token = os.environ.get(TOKEN, "")
    if not token and host in LOCAL:
        return None
    if len(token) < MIN_TOKEN:
        what = f"is {len(token)} characters long" if token else "is not set"
        raise UserError(f"host={host}: others can reach this server, so it needs a token: put {MIN_TOKEN} characters or more into the environment variable"
                        f" {TOKEN} (it {what}), or leave host={HOST} and reach it by ssh -L")  # fmt: skip
    return token


def check_installed() -> None:
    """Raises UserError if the packages of the extra `serve` are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"mmft serve needs {' and '.join(missing)}: pip install 'mmft[serve]'")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on this address. Raises UserError if the port is taken."""
    free_port(port, host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    if os.name != "nt":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"port={port}: cannot be used ({error.strerror or error}); name another, or port=0 for any free one") from None
    return listener
