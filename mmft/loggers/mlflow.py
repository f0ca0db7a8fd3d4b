"""MLflow: log to a tracking server, or to a database file in the folder of the runs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.records import AnswerRecord
from .base import Board, Logger, grouped
from .outside import COLUMNS, REPORT, answer_rows, flat, quiet, require, sweep_of
from .swanlab import without_secrets

NOTICES = ("mlflow", "alembic")  # loggers
LONGEST = 500  # characters of a parameter's value
MOST = 100  # parameters in one call
STATES = {"finished": "FINISHED", "failed": "FAILED"}  # others: KILLED


@dataclass(kw_only=True)
class Mlflow(Logger):
    """tracking_uri: of the server; None: MLFLOW_TRACKING_URI, else sqlite in mlflow.db beside the run directories.

    Settings are parameters, answers a table in answers/ with their pictures, a sweep is the tag mmft.sweep, the report an artifact. Raises
    UserError without the package.
    """

    tracking_uri: str | None = None
    experiment: str = "mmft"
    picture_size: int = 256
    _client: Any = field(default=None, init=False, repr=False)
    _id: str = field(default="", init=False, repr=False)
    _dir: Path = field(default=Path(), init=False, repr=False)

    def __post_init__(self) -> None:
        require("mlflow", "mlflow")

    def open(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self._dir = run_dir
        for variable, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")):
            os.environ.setdefault(variable, value)  # by default a run would wait for minutes for a server that is down
        with quiet(*NOTICES):
            from mlflow import MlflowClient
            from mlflow.entities import Param

            home = run_dir.absolute().parent
            home = home.parent if (run_dir.parent / "plan.json").is_file() else home  # of a point
            uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').as_posix()}"
            self._client = MlflowClient(uri)
            found = self._client.get_experiment_by_name(self.experiment)
            place = (home / "mlflow").as_uri() if uri.startswith("sqlite:") else None  # else the server's own
            experiment = found.experiment_id if found is not None else self._client.create_experiment(self.experiment, artifact_location=place)
            sweep = sweep_of(run_dir)
            tags = {"mmft.run": str(run_dir), **({"mmft.sweep": sweep} if sweep else {})}
            self._id = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
            parameters = [Param(key, str(value)[:LONGEST]) for key, value in flat(without_secrets(dict(config))).items()]
            for start in range(0, len(parameters), MOST):
                self._client.log_batch(self._id, params=parameters[start : start + MOST])

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        with quiet(*NOTICES):
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self._client.log_batch(self._id, metrics=[Metric(grouped(k), v, now, step) for k, v in values.items()])

    def write_samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        name = tag.replace(" ", "_")
        table: dict[str, list[Any]] = {"step": [], **{column: [] for column in COLUMNS}}
        with quiet(*NOTICES), tempfile.TemporaryDirectory() as folder:
            for n, (row, picture, *texts) in enumerate(answer_rows(rows, self.picture_size)):
                file = f"{name}_{step}_{n}.png"
                if picture is not None:
                    picture.save(Path(folder) / file)
                    self._client.log_artifact(self._id, str(Path(folder) / file), "answers/pictures")
                for column, value in zip(table, (step, row, f"pictures/{file}" if picture is not None else "", *texts), strict=True):
                    table[column].append(value)
            self._client.log_table(self._id, table, f"answers/{name}.json")

    def write_leaderboard(self, board: Board) -> None:
        with quiet(*NOTICES):
            self._client.log_table(self._id, {name: [row[i] for row in board.rows] for i, name in enumerate(board.columns)}, "leaderboard.json")

    def close(self, status: str) -> None:
        client, self._client = self._client, None
        if client is None or not self._id:
            return
        with quiet(*NOTICES):
            if status == "finished" and (self._dir / REPORT).is_file():
                client.log_artifact(self._id, str(self._dir / REPORT))
            client.set_terminated(self._id, STATES.get(status, "KILLED"))
