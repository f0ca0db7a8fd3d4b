"""`mmft serve run=DIR` or `run=[A,B]`: an OpenAI-compatible endpoint for a base model and its runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from ..common.errors import at_least

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

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> None:
        """Serve until Ctrl-C. Raises UserError before weights are read, and if the server does not answer as predict does."""
        from ..serving.listener import LOCAL, check_installed, listening, token_of

        check_installed()
        at_least(self, batch=1, queue=1, check=0)
        token = token_of(self.host)
        with listening(self.host, self.port) as listener:
            from ..serving.adapters import open_models

            models = open_models([str(path) for path in (self.run if isinstance(self.run, list) else [self.run] if self.run is not None else [])], cfg, overrides, self.checkpoint)
            from ..serving import server  # imports transformers, which loading the model has to import first
            from ..serving.parity import checked_engine

            with checked_engine(models, self.batch, self.queue, self.check) as engine:
                app = server.Server(engine, token, local=self.host in LOCAL)
                address = f"[{self.host}]" if ":" in self.host else self.host
                log.info("%-14s %s", "models", ", ".join(served.name for served in models))
                who = "only on this machine" if self.host in LOCAL else "for all who can reach this machine and have the token; put https before it on a network you do not trust"
                print(f"\nhttp://{address}:{listener.getsockname()[1]}/v1  ({who}; Ctrl-C ends it)", flush=True)
                try:
                    server.run(app, listener)
                finally:
                    app.close()
