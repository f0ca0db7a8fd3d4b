"""lmms-eval in an environment of its own asks a model of this server; its results are read from the files it writes.

The environment variable MMFT_LMMS_EVAL names that environment (its folder, or its python). No file can name it: a config cannot start programs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.records import TaskResult

VARIABLE = "MMFT_LMMS_EVAL"
FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # begins an answer that lmms-eval did not get
SECONDS = 600  # for one answer


def interpreter() -> Path:
    """The python of lmms-eval's environment. Raises UserError."""
    given = os.environ.get(VARIABLE)
    if not given:
        raise UserError(f"mmft benchmark needs lmms-eval in an environment of its own: python -m venv ENV && ENV/bin/pip install lmms-eval, then {VARIABLE}=ENV")
    path = Path(given).expanduser()
    candidates = [path, path / "bin" / "python", path / "Scripts" / "python.exe"]
    found = next((p for p in candidates if p.is_file() and os.access(p, os.X_OK)), None)
    if found is None:
        raise UserError(f"{VARIABLE}={given}: holds no python; name the folder of an environment, or its python")
    done = subprocess.run([str(found), "-c", "import lmms_eval"], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise UserError(f"{VARIABLE}={given}: lmms-eval cannot be imported there: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
    return found


def measure(python: Path, url: str, name: str, tasks: Sequence[str], limit: int | None, folder: Path) -> dict[str, TaskResult]:
    """task -> its result, for the model `name` of the server at `url`. folder: gets lmms-eval's files. Raises UserError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [str(python), "-m", "lmms_eval", "--model", "openai", "--model_args", f"model_version={name},base_url={url},timeout={SECONDS}", "--tasks", ",".join(tasks),
               "--batch_size", "1", "--log_samples", "--output_path", str(folder)]  # fmt: skip
    command += ["--limit", str(limit)] if limit is not None else []
    environment = {**os.environ, "OPENAI_API_KEY": "none", "OPENAI_API_BASE": url, "OPENAI_BASE_URL": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment.pop("PYTHONPATH", None)  # of this environment
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    files = sorted(folder.rglob("*results.json"))
    if done.returncode or not files:
        lines = [line for line in (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise UserError(f"lmms-eval ended with code {done.returncode}{'' if files else ' and wrote no results'}: {lines[-1][:300] if lines else 'it said nothing'} (all in {folder / 'log.txt'})")
    failed = sum(path.read_text(encoding="utf-8", errors="replace").count(FAILED) for path in folder.rglob("*.jsonl"))
    if failed:
        raise UserError(f"lmms-eval got no answer to {failed} requests, so its scores mean nothing (see {folder / 'log.txt'})")
    return read_results(files[-1])


def read_results(path: Path) -> dict[str, TaskResult]:
    """The scores of a results file of lmms-eval: `METRIC,FILTER` -> number; errors and names are left out. Raises UserError."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, TaskResult] = {}
        for task, values in content["results"].items():
            directions = (content.get("higher_is_better") or {}).get(task) or {}
            scores: dict[str, float] = {}
            higher: dict[str, bool] = {}
            for key, value in values.items():
                metric, _, chosen = key.partition(",")
                if isinstance(value, (int, float)) and not isinstance(value, bool) and not metric.endswith("_stderr") and metric not in ("samples", "alias"):
                    label = metric if chosen in ("", "none") else f"{metric}_{chosen}"
                    scores[label], higher[label] = float(value), directions.get(metric) is not False
            counts = (content.get("n-samples") or {}).get(task) or {}
            if scores:  # a group of tasks may have none of its own
                found[str(task)] = {"scores": scores, "higher_is_better": higher, "rows": counts.get("effective")}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as results of lmms-eval ({type(error).__name__}: {error})") from None
    return found
