"""The Python API: train, open a run, list runs, prepare data. The command line calls the same verbs through `call`.

Nothing here imports torch before a model is needed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from .common.errors import UserError
from .common.files import read_json, read_jsonl
from .config.python_words import Overrides, as_words, bare_keys
from .data.samples import Prepared, Samples

if TYPE_CHECKING:
    import pandas
    from omegaconf import DictConfig
    from PIL.Image import Image

    from .common.records import AnswerRecord, EvaluationSummary, Summary
    from .data.prepared import PreparedData
    from .evaluation.inputs import Asked
    from .runs.open import OpenedRun

    Picture: TypeAlias = str | Path | Image | bytes  # an image: a file, a PIL image, or the bytes of a file

__all__ = ["Prepared", "Run", "Samples", "UserError", "call", "compose_verb", "open_run", "prepare", "runs", "train"]

log = logging.getLogger("mmft")


def train(overrides: Overrides = None, *, config_dir: str | Path | None = None) -> Run:
    """Train what the config says, as `mmft train` does, and return the run.

    overrides: a list of words, ["model=tiny", "lora.r=4"], or a dict, {"model": "tiny", "lora": {"r": 4}}. config_dir: your own groups
    beside the shipped ones. Raises UserError.
    """
    cfg, words = compose_verb("train", {}, overrides, config_dir)
    return Run(cast("Any", call(cfg, words)).path)


def open_run(path: str | Path, *, folder: str | Path = "outputs") -> Run:
    """A run by its directory, or by `last`, `best` or the beginning of the name of one below `folder`. Raises UserError."""
    from .runs.catalog import find_run
    from .runs.open import run_folder

    return Run(run_folder(find_run(str(path), folder)))


def runs(
    folder: str | Path = "outputs", *, where: str | None = None, by: str | None = None, show: Sequence[str] | None = None, top: int | None = None
) -> pandas.DataFrame:
    """All runs below a folder, at any depth, one row each: started, status, scores, path.

    where: a condition, "lora.r>8 and status==finished". by: a number to sort by, the best first. show: further columns, keys of the
    config among them; None: every metric that a run has measured. top: the number of rows at most. Raises UserError.
    """
    import pandas

    from .verbs.runs import Runs

    listed = Runs(folder=str(folder), where=where, by=by, show=list(show or ()), top=top, all_metrics=show is None).list_runs(Path(folder))
    frame = pandas.DataFrame([row.values for row in listed.rows], columns=pandas.Index(listed.columns), index=pandas.Index([row.name for row in listed.rows], name="run"))
    frame["started"] = pandas.to_datetime(frame["started"])
    return frame.assign(path=[str(row.path) for row in listed.rows])


def prepare(overrides: Overrides = None, *, config_dir: str | Path | None = None) -> Prepared:
    """Prepare a data set, as `mmft prepare` does: {"data": "table", "data.path": "captions.csv"}. Raises UserError."""
    cfg, words = compose_verb("prepare", {}, overrides, config_dir)
    return Prepared(cast("PreparedData", call(cfg, words)))


class Run:
    """A run directory. The model is loaded when a method first needs it, and stays in memory until `close`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._opened: tuple[tuple[int | None, str | None], OpenedRun] | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was trained with. Raises UserError."""
        from omegaconf import OmegaConf

        from .runs.open import read_snapshot

        return cast("dict[str, Any]", OmegaConf.to_container(read_snapshot(self.path)))

    @property
    def summary(self) -> Summary:
        """summary.json: status, losses, metrics of base and tuned model, times; {} for a run that wrote none yet."""
        return cast("Summary", read_json(self.path / "summary.json"))

    @property
    def status(self) -> str:
        """finished, failed, interrupted, preempted, pruned, or unfinished."""
        return str(self.summary.get("status") or "unfinished")

    def metrics(self) -> pandas.DataFrame:
        """What training logged, one row for each log: step, epoch, loss, eval_loss, learning_rate, ..."""
        import pandas

        return pandas.DataFrame(read_jsonl(self.path / "metrics.jsonl"))

    def answers(self, which: str = "tuned") -> pandas.DataFrame:
        """The held-out rows with the model's answers, as training measured them. which: tuned or base. Raises UserError."""
        import pandas

        if which not in ("tuned", "base"):
            raise UserError(f"which={which}: must be tuned or base")
        return pandas.DataFrame(read_jsonl(self.path / "eval" / f"{which}.jsonl"))

    def evaluate(self, overrides: Overrides = None, *, base: bool = False, checkpoint: int | None = None) -> EvaluationSummary:
        """Measure the run on a prepared split, as `mmft evaluate` does: {"evaluation.split": "test"}. Returns the metrics. Raises UserError."""
        cfg, words = self._verb("evaluate", {"checkpoint": checkpoint, "base": base}, overrides)
        return cast("EvaluationSummary", call(cfg, words, opener=self._open))

    def predict(
        self, images: Picture | Sequence[Picture], prompt: str | Sequence[str] | None = None, *, together: bool = False,
        choose: Sequence[str] | str | None = None, checkpoint: int | None = None, overrides: Overrides = None,
    ) -> list[AnswerRecord]:  # fmt: skip
        """Answer for images, in batches: one record for each, its text in "prediction".

        images: one or several files, folders, PIL images or bytes; or a table or split, as `mmft predict input=` takes. prompt: the
        question, or one for each image; None: what all held-out rows of the run ask. together: all images in one prompt. choose: choose
        among these texts instead of generating. An image that cannot be read has "error" instead of an answer. Raises UserError.
        """
        from .config.build import build

        given = list(images) if isinstance(images, (list, tuple)) else [images]
        if not given:
            raise UserError("images: give at least one image")
        with _as_files(given) as (files, named):
            asked = None if prompt is None or isinstance(prompt, str) else _asked(files, list(prompt), named, together)
            keys = {"checkpoint": checkpoint, "choose": choose, "together": together}
            keys |= {"input": files[0] if len(files) == 1 else files, "prompt": prompt} if asked is None else {}
            cfg, words = self._verb("predict", keys, overrides)
            records: list[AnswerRecord] = build(cfg.task, "task").answers(cfg, words, self._open, asked)
        for record in records:
            record["id"] = named.get(record["id"], record["id"])
        return records

    def compare(
        self, other: Run | str | Path | None = None, *, index: int | Sequence[int] | None = None, images: str | Path | Sequence[str | Path] | None = None,
        prompt: str | None = None, overrides: Overrides = None,
    ) -> pandas.DataFrame:  # fmt: skip
        """The same samples answered by the base and this run, or by this run and another: one row each, a column for each model.

        Writes the page of `mmft compare`; its path is `.attrs["page"]`. index: rows of the held-out split; None: eight. images: your
        own. Raises UserError.
        """
        import pandas

        against = Path(other.path if isinstance(other, Run) else other) if other is not None else None
        keys: dict[str, Any] = {"run": self.path if against is None else [self.path, against], "prompt": prompt}
        keys |= {"index": list(index) if isinstance(index, Sequence) else index, "input": list(map(str, images)) if isinstance(images, (list, tuple)) else images}
        cfg, words = self._verb("compare", keys, overrides)
        result = cast("Any", call(cfg, words, **({"opener": self._open} if against is None else {})))
        first = result.sides[0].rows
        frame = pandas.DataFrame({
            "id": [row["id"] for row in first], "prompt": [row.get("prompt", "") for row in first], "references": [row["references"] for row in first],
            **{side.label: [row["prediction"] for row in side.rows] for side in result.sides},
        })  # fmt: skip
        frame.attrs["page"] = str(result.page)
        return frame

    def merge(self, out: str | Path | None = None, overrides: Overrides = None, **keys: Any) -> Path:
        """Write one plain model of base and adapter, as `mmft merge` does, and return its folder. keys: those of the verb (dtype="fp32").

        Frees the model that this object holds. Raises UserError.
        """
        self.close()
        cfg, words = self._verb("merge", {"out": out, **keys}, overrides)
        return Path(cast("Path", call(cfg, words)))

    def close(self) -> None:
        """Free the loaded model."""
        self._opened = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        loss = self.summary.get("eval_loss")
        return f"<Run {self.path}: {self.status}{f', held-out loss {loss:.3f}' if isinstance(loss, float) else ''}>"

    def _repr_html_(self) -> str:
        from .reports.tables import metric_rows

        summary = self.summary
        rows = [(row["label"], row["base"], row["tuned"], row["change"]) for row in metric_rows(summary)]
        head = f"<b>{escape(self.name)}</b> {escape(self.status)}<br><code>{escape(str(self.path))}</code>"
        return head + (_html_table(("", "base", "tuned", "change"), rows) if rows else "")

    def _verb(self, verb: str, keys: Mapping[str, Any], overrides: Overrides) -> tuple[DictConfig, list[str]]:
        """The config and words of a verb about this run; data sets are looked for where the run had them."""
        words = as_words(overrides)
        home = self.config.get("output_dir") if not any(word.startswith("output_dir=") for word in words) else None
        return compose_verb(verb, {"run": self.path, **keys}, [*as_words({"output_dir": home} if home else None), *words], None)

    def _open(self, path: str | Path | None, cfg: DictConfig, overrides: list[str], checkpoint: int | None) -> OpenedRun:
        """`open_any`, which loads the model once: what a command may change of a run are data, evaluation and generation."""
        from .config.plain import resolved
        from .runs.open import any_config, open_any

        _, kept = any_config(path, cfg, overrides, checkpoint)
        key = (checkpoint, kept.model.get("path"))
        if self._opened is None or self._opened[0] != key:
            self._opened = None  # one model at a time
            self._opened = key, open_any(path, cfg, overrides, checkpoint)
        return replace(self._opened[1], cfg=kept, settings=resolved(kept))


# --- what the command line shares -----------------------------------------------------------------------------------


def compose_verb(verb: str, keys: Mapping[str, Any], overrides: Overrides, config_dir: str | Path | None) -> tuple[DictConfig, list[str]]:
    """The config of a verb and the words that made it. keys: the verb's own, those with None left out. Raises UserError."""
    from .config.compose import compose

    given = as_words(overrides)
    if other := next((word for word in given if word.startswith("task=") and word != f"task={verb}"), None):
        raise UserError(f"{other}: this is mmft {verb}; call the function of the other verb")
    own = as_words({f"task.{key}": value for key, value in keys.items() if value is not None})
    words = [f"task={verb}", *own, *bare_keys(verb, given)]
    return compose(words, None if config_dir is None else str(config_dir)), words


def call(cfg: DictConfig, words: Sequence[str], **options: object) -> object:
    """Call the config's verb. words: the overrides of this config, which verbs that create a run record. options: of the verb's call."""
    from .config.build import build
    from .runs.catalog import resolve_names
    from .system.console import set_up_logging

    set_up_logging()
    for word, path in resolve_names(cfg.task, cfg.output_dir).items():
        log.info("%-14s %s is %s", "run", word, path)
    return build(cfg.task, "task")(cfg, [word.lstrip("+") for word in words], **options)


@contextmanager
def _as_files(images: Sequence[Any]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """(a file for each image, the name to show for each file that was made), for the block. Raises UserError."""
    from PIL.Image import Image

    with tempfile.TemporaryDirectory(prefix="mmft-images-") as folder:
        files, named = [], {}
        for number, image in enumerate(images):
            if isinstance(image, (str, Path)):
                files.append(Path(image).as_posix())
                continue
            path = Path(folder) / f"{number}.png"
            if isinstance(image, (bytes, bytearray)):
                path.write_bytes(image)
            elif isinstance(image, Image):
                image.save(path, "PNG")
            else:
                raise UserError(f"images[{number}]: a {type(image).__name__} is no image; give a path, a PIL image or the bytes of an image file")
            files.append(path.as_posix())
            named[path.as_posix()] = f"images[{number}]"
        yield files, named


def _asked(files: Sequence[str], prompts: Sequence[str], named: Mapping[str, str], together: bool) -> list[Asked]:
    """One question for each image. Raises UserError."""
    from .evaluation.inputs import ask

    if together:
        raise UserError("together=True takes one prompt for all images")
    if len(files) != len(prompts):
        raise UserError(f"prompt: {len(prompts)} questions for {len(files)} images; give one for each image, or one text for all")
    return [ask(named.get(file, file), [Path(file)], prompt) for file, prompt in zip(files, prompts, strict=True)]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead><tbody>{cells}</tbody></table>"
