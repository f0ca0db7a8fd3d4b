"""What a command prints: mmft's own lines on stdout, and only warnings of the libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from .distributed import is_main


def shows_progress() -> bool:
    """Whether progress bars are shown: stderr is a terminal, or the output of a notebook's cell."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and kernel.IPKernelApp.initialized()


def set_up_logging() -> None:
    """Send mmft's log to stdout as plain lines and silence the libraries' notices."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: not getattr(record, "kept", False))  # records that only the run's own log.txt shows
    handler.set_name("stdout")
    log = logging.getLogger("mmft")
    # the other handlers write the log.txt of sweep points
    log.handlers, log.propagate = [handler, *(h for h in log.handlers if h.get_name() != "stdout")], False
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    for library in ("transformers", "peft"):  # deprecations are for mmft to follow, not for its users
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of missing optional kernels at every import
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked after the tokenizer was used
