"""A page of `mmft compare ui=true` in a process of its own, for the tests of it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def served(log: Path, words: list[str], host: str = "127.0.0.1", **environment: str) -> Iterator[str]:
    """The page's address, as its command says it in `log`; the process is ended behind the block."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmft", "compare", *words, "ui=true", "port=0"], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
    try:
        for _ in range(1200):
            found = re.search(rf"http://{re.escape(host)}:\d+/", log.read_text(encoding="utf-8"))
            if found:
                break
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)
