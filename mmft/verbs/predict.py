"""`mmft predict run=DIR input=...`: answers for images, tables of questions and prepared splits; `chat=true`: a conversation."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..common.errors import Incomplete, UserError
from ..config.plain import to_plain

if TYPE_CHECKING:
    from ..common.records import AnswerRecord
    from ..evaluation.answer_table import AnswerFile
    from ..evaluation.inputs import Message
    from ..evaluation.metrics.base import MetricSet

log = logging.getLogger("mmft")


@dataclass
class Predict:
    """The keys of conf/task/predict.yaml. Inputs that cannot be read are named on stderr and left unanswered (exit code 1)."""

    run: str | None = None
    checkpoint: int | None = None
    input: Any = None
    prompt: Any = None
    together: bool = False
    out: str | None = None
    chat: bool = False

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> list[AnswerRecord] | list[Message]:
        """Print the answers or write them to out=. Raises UserError; Incomplete if some inputs could not be answered."""
        from ..evaluation.answer import answer_prompts, prompts_of
        from ..evaluation.answer_table import AnswerFile
        from ..evaluation.metrics.defaults import metric_set
        from ..runs.open import any_config, open_any

        run, run_cfg = any_config(self.run, cfg, overrides, self.checkpoint)
        if self.chat:
            from ..serving.chat import chat

            return chat(open_any(self.run, cfg, overrides, self.checkpoint))
        asked = prompts_of(self.input, self.prompt, self.together, run.path if run else None, run_cfg)
        table = AnswerFile(Path(self.out)) if self.out is not None else None
        records = []
        try:
            opened = open_any(self.run, cfg, overrides, self.checkpoint)
            for record in answer_prompts(opened.evaluator([a.sample for a in asked if a.sample is not None]), opened.model, asked, opened.settings["seed"]):
                records.append(record)
                if record.get("error"):
                    complain(record["error"])
                elif table is None:
                    text = str(record["prediction"])
                    print(text if len(asked) == 1 else f"{record['id']}\n    {text}", flush=True)
                if table is not None:
                    table.add(record)
            finish(records, table, metric_set(to_plain(run_cfg.get("metrics"))))
        finally:
            if table is not None:
                table.discard()
        if table is not None and run is not None:
            run.record("predict", overrides, [table.path])
        failed = sum(bool(r.get("error")) for r in records)
        if failed:
            raise Incomplete(f"{failed} of {len(records)} inputs could not be answered, each is named above; the other {len(records) - failed} were"
                             f"{f' (all in {table.path})' if table is not None else ''}")  # fmt: skip
        return records


def finish(records: list[AnswerRecord], table: AnswerFile | None, metrics: MetricSet) -> None:
    """Give the table its name and show the metrics of answers with references. Raises UserError if nothing was answered."""
    answered = [r for r in records if not r.get("error")]
    if not answered:
        raise UserError(f"none of the {len(records)} inputs could be answered; nothing was written" if len(records) > 1 else "nothing was answered")
    if table is not None:
        table.finish()
        log.info("%d answers in %s", len(answered), table.path)
    referenced = [r for r in answered if r["references"]]
    if len(referenced) > 1:
        from ..evaluation.token_limit import count_answers
        from ..reports import terminal

        scores = metrics.corpus(referenced)
        counts = count_answers(records)
        values = {**{k: f"{v:.3f}" for k, v in scores.items()}, "references per row": f"{counts['references_per_row']:g}",
                  "rows left out": counts["left_out"]}  # fmt: skip
        terminal.show(terminal.pairs_table(f"{len(referenced)} rows with references", values))
    truncated = sum(bool(r.get("truncated")) for r in answered)
    if truncated:
        log.info("%d of %d answers stopped at the limit of new tokens (generation.max_new_tokens=N raises it)", truncated, len(answered))


def complain(text: str) -> None:
    """Print a line to stderr above the progress bar."""
    from tqdm import tqdm

    tqdm.write(f"mmft: {text}", file=sys.stderr)
