"""Download images that rows name by URL, during `mmft prepare` only, from listed hosts only, within limits.

    mmft prepare data=table data.path=rows.csv 'data.download.hosts=[images.example.org]'

A host name is resolved once; the resolved address is checked and then used for the connection, so a second DNS answer
(DNS rebinding) has no effect. Redirects are followed to listed hosts only, each checked in the same way.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from .. import __version__
from ..common.errors import UserError
from ..config.guard.secrets import redact
from .images import MAX_BYTES, ImageError

PORTS = {"http": 80, "https": 443}
REDIRECTS = 5
RETRY_AFTER = (0.2, 0.8)  # seconds before the second and the third request


class TransientError(ImageError):
    """A download that failed for a reason that may pass."""


class RefusedError(ImageError):
    """A URL that may not be requested."""


@dataclass(frozen=True)
class Download:
    """hosts: the hosts images may come from (`images.example.org`, or `host:8080` for another port than 80 and 443).

    max_bytes: of one image. timeout: seconds for one image in total, redirects included. private: whether host names may
    resolve to addresses of a private network; an address listed in `hosts` itself (`10.0.0.5`) is always allowed.
    """

    hosts: Sequence[str] = ()
    max_bytes: int = 20_000_000
    timeout: float = 30.0
    private: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.hosts, str) or not self.hosts or not all(isinstance(h, str) and h and "/" not in h and "*" not in h for h in self.hosts):
            raise UserError("data.download.hosts: name the hosts that images may come from, without scheme and path: data.download.hosts=[images.example.org]")
        if isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int) or not 0 < self.max_bytes <= MAX_BYTES:
            raise UserError(f"data.download.max_bytes={self.max_bytes}: must be a number of bytes from 1 to {MAX_BYTES}")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not 0 < self.timeout <= 3600:
            raise UserError(f"data.download.timeout={self.timeout}: must be a number of seconds from 0 to 3600")

    def fetch(self, url: str) -> bytes:
        """The bytes of the image at `url`. Raises ImageError with the limit or response that caused it.

        Requests that failed for a reason that may pass (no connection, a response of 429 or 5xx, a short body) are repeated, within `timeout`.
        """
        deadline = time.monotonic() + self.timeout
        for wait in (*RETRY_AFTER, None):
            try:
                return self._follow(url, deadline)
            except TransientError:
                if wait is None or time.monotonic() + wait >= deadline:
                    raise
                time.sleep(wait)
        raise AssertionError  # the last round returns or raises

    def _follow(self, url: str, deadline: float) -> bytes:
        """The body that `url` or its redirects lead to. Raises ImageError."""
        address = url
        for _ in range(REDIRECTS + 1):
            parts = self._check(address, url)
            response = self._get(parts, deadline, url)
            if isinstance(response, bytes):
                return response
            address = urljoin(address, response)
        raise _error(url, f"more than {REDIRECTS} redirects")

    def _check(self, address: str, url: str) -> SplitResult:
        """The parts of an address that may be requested. Raises ImageError for all others."""
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            raise _error(url, "not a URL that can be read", RefusedError) from None
        if parts.scheme not in PORTS or not parts.hostname:
            raise _error(url, f"{parts.scheme or 'no scheme'}: only http and https are fetched", RefusedError)
        if parts.username is not None or parts.password is not None:
            raise _error(url, "a name or password in the address is not sent", RefusedError)
        # control characters could end the request line; spaces and the like must be encoded
        if not all(33 <= ord(c) < 127 for c in address):
            raise _error(url, "characters that must be percent-encoded", RefusedError)
        host = parts.hostname.lower()
        shown = f"[{host}]" if ":" in host else host
        default_port = port in (None, PORTS[parts.scheme])
        names = {h.lower() for h in self.hosts}
        if f"{shown}:{port or PORTS[parts.scheme]}" not in names and not (default_port and ({host, shown} & names)):
            raise _error(url, f"{shown}{'' if default_port else f':{port}'} is not in data.download.hosts", RefusedError)
        return parts

    def _address(self, parts: SplitResult, url: str) -> tuple[int, tuple[Any, ...]]:
        """(family, socket address) to connect to. Raises ImageError for addresses that are not allowed."""
        try:
            answers = socket.getaddrinfo(parts.hostname, parts.port or PORTS[parts.scheme], type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _error(url, f"its host is not found ({getattr(error, 'strerror', None) or error})", TransientError) from None
        literal = _is_address(parts.hostname or "")
        for family, _, _, _, address in answers:
            ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
            ip = getattr(ip, "ipv4_mapped", None) or ip
            forbidden = ip.is_multicast or ip.is_unspecified or (ip.is_link_local and not literal)
            if not forbidden and (ip.is_global or literal or self.private):
                return family, address
        raise _error(url, "its host is in a private network (data.download.private=true allows it)")

    def _get(self, parts: SplitResult, deadline: float, url: str) -> bytes | str:
        """The body, or the target of a redirect."""
        family, socket_address = self._address(parts, url)
        left = deadline - time.monotonic()
        if left <= 0:
            raise _error(url, f"took longer than {self.timeout:g} s")
        raw = socket.socket(family, socket.SOCK_STREAM)
        raw.settimeout(left)
        # a server that sends single bytes stays below the timeout of each read; the timer ends the whole request
        watch = threading.Timer(left, _shut_down, [raw])
        watch.daemon = True
        watch.start()
        connection: http.client.HTTPConnection | None = None
        try:
            raw.connect(socket_address)
            protocol = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = protocol(parts.hostname or "", parts.port)
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname) if parts.scheme == "https" else raw
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": f"mmft/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"})
            response = self._read(connection.getresponse(), url)
            if time.monotonic() >= deadline:  # a body cut off by the timer must not pass as complete
                raise OSError
            return response
        except ImageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= deadline
            why = f"took longer than {self.timeout:g} s" if late else " ".join(str(error).split()) or type(error).__name__
            kind = ImageError if late or isinstance(error, ssl.SSLCertVerificationError) else TransientError
            raise _error(url, why, kind) from None
        finally:
            watch.cancel()
            if connection is not None:
                connection.close()
            raw.close()

    def _read(self, answer: http.client.HTTPResponse, url: str) -> bytes | str:
        if answer.status in (301, 302, 303, 307, 308) and answer.getheader("Location"):
            return str(answer.getheader("Location"))
        if answer.status != 200:
            raise _error(url, f"its host answers {answer.status}", TransientError if answer.status == 429 or answer.status >= 500 else ImageError)
        if (answer.getheader("Content-Encoding") or "identity").lower() != "identity":
            raise _error(url, "its host sends it packed")
        length = answer.getheader("Content-Length")
        if length is not None and length.isdigit() and int(length) > self.max_bytes:
            raise _error(url, f"{length} bytes, more than data.download.max_bytes={self.max_bytes}")
        body = bytearray()
        while data := answer.read1(1 << 16):
            body += data
            if len(body) > self.max_bytes:
                raise _error(url, f"more than data.download.max_bytes={self.max_bytes} bytes")
        if length is not None and length.isdigit() and len(body) != int(length):
            raise _error(url, f"{len(body)} of {length} bytes came", TransientError)
        return bytes(body)


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed
        sock.shutdown(socket.SHUT_RDWR)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_url(image: str) -> bool:
    return image.lower().startswith(("http://", "https://"))


def _error(url: str, why: str, kind: type[ImageError] = ImageError) -> ImageError:
    return kind("", f"download: {redact(url[:200])}: {why}")
