"""`mmft serve run=DIR` or `run=[A,B]`: an OpenAI-compatible endpoint for a base model and its runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..common.errors import at_least

if TYPE_CHECKING:
    from ..serving.engine import AnswerEngine

log = logging.getLogger("mmft")


@dataclass
class Serve:
    """The keys of conf/task/serve.yaml."""

    run: Any = None
    checkpoint: int | None = None
    port: int = 8000
    host: str = "127.0.0.1"
    batch: int | None = None
    queue: int = 256
    check: int = 4
    backend: str = "transformers"
    vllm: Any = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> None:
        """Serve until Ctrl-C. Raises UserError before weights are read, and if the server does not answer as predict does."""
        from ..serving.listener import LOCAL, check_installed, listening, token_of
        from ..serving.vllm.choice import check_backend

        check_installed()
        at_least(self, batch=1, queue=1, check=0)
        check_backend(self.backend, self.vllm)
        token = token_of(self.host)
        with listening(self.host, self.port) as listener, self._engine(cfg, overrides) as engine:
            from ..serving import server  # imports transformers, which loading the model has to import first

            app = server.Server(engine, token, local=self.host in LOCAL)
            address = f"[{self.host}]" if ":" in self.host else self.host
            log.info("%-14s %s", "models", ", ".join(engine.models))
            who = "only on this machine" if self.host in LOCAL else "for all who can reach this machine and have the token; put https before it on a network you do not trust"
            print(f"\nhttp://{address}:{listener.getsockname()[1]}/v1  ({who}; Ctrl-C ends it)", flush=True)
            try:
                server.run(app, listener)
            finally:
                app.close()

    @contextmanager
    def _engine(self, cfg: DictConfig, overrides: list[str]) -> Iterator[AnswerEngine]:
        """The running engine, checked. Raises UserError."""
        paths = [str(path) for path in (self.run if isinstance(self.run, list) else [self.run] if self.run is not None else [])]
        if self.backend == "vllm":
            from ..serving.vllm.engine import served_engine

            with served_engine(paths, cfg, overrides, self.checkpoint, self.vllm, self.check, self.batch, self.queue) as vllm_engine:
                yield vllm_engine
            return
        from ..serving.adapters import open_models

        models = open_models(paths, cfg, overrides, self.checkpoint)
        from ..serving.parity import checked_engine

        with checked_engine(models, self.batch, self.queue, self.check) as engine:
            yield engine
