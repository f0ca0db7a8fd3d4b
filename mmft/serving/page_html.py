"""HTML fragments of the live comparison page; all text in them is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, cast

from ..common.files import read_json
from ..common.records import AnswerRecord, PlanReport
from ..data.sample import Sample
from ..reports import answers, numbers, pictures
from ..reports.answers import Verdict
from ..reports.tables import plan_rows
from .side_by_side import AnswerState, Model

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 640  # pixels of a picture shown

NOTE = (
    '<div class="mmft"><p class="key">temperature 0 takes the likeliest words, and top_p then has no effect; above 0 it draws them, with the same seed'
    " for every model. With more than one beam the answer is shown at its end.</p></div>"
)

CSS = """
.mmft { --bad: #fbdccb; --missing: #0072b2; --good-bg: #d8f1e6; --near-bg: #fbf0d5; --bad-bg: #fbe7dc; --base: #7c858e; --tuned: #0072b2; }
.dark .mmft { --bad: #5b3220; --missing: #7cc4f0; --good-bg: #143429; --near-bg: #3a2f12; --bad-bg: #43261a; --base: #a6afb8; --tuned: #56b4e9; }
.mmft h1 { font-size: 22px; margin: 0 0 4px; } .mmft .about { opacity: 0.75; font-size: 14px; overflow-wrap: anywhere; }
.mmft .about b { color: var(--tuned); } .mmft .about b.base { color: var(--base); }
.mmft-pictures { display: flex; flex-wrap: wrap; gap: 8px; }
.mmft-pictures img { max-width: 100%; max-height: 340px; border: 1px solid var(--border-color-primary); border-radius: 8px; object-fit: contain; } .mmft-pictures img.small { width: 240px; image-rendering: pixelated; }
.framed { position: relative; display: inline-block; } .framed svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.framed rect { fill: transparent; } .framed rect, .framed path { stroke: #0072b2; stroke-width: 2px; vector-effect: non-scaling-stroke; } .framed path { stroke-width: 9px; stroke-linecap: round; }
.framed .reference { stroke: #0b7a55; stroke-dasharray: 5 3; } .framed .base { stroke: #7c858e; }
.mmft .line { margin: 8px 0 0; overflow-wrap: anywhere; white-space: pre-line; } .mmft .tag { display: inline-block; opacity: 0.6; font-size: 12px; margin-right: 8px; }
.mmft-columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; }
.mmft-answer { border: 1px solid var(--border-color-primary); border-top: 3px solid var(--tuned); border-radius: 8px; padding: 12px 14px; min-height: 130px; background: var(--background-fill-primary); }
.mmft-answer.base { border-top-color: var(--base); }
.mmft-answer header { display: flex; justify-content: space-between; font-weight: 650; margin-bottom: 8px; }
.mmft-answer .text { font-size: 16px; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; } .mmft-answer .wait { opacity: 0.55; font-size: 14px; }
.mmft-answer .cursor { display: inline-block; width: 8px; height: 16px; background: var(--tuned); vertical-align: -2px; margin-left: 2px; }
.mmft mark { background: var(--bad); color: inherit; border-radius: 3px; padding: 0 2px; }
.mmft mark.missing { background: none; color: var(--missing); border-bottom: 1px dashed var(--missing); font-style: italic; }
.mmft .verdict { font-size: 12px; padding: 2px 9px; border-radius: 99px; } .mmft .good { background: var(--good-bg); } .mmft .near { background: var(--near-bg); } .mmft .bad { background: var(--bad-bg); }
.mmft .key { font-size: 13px; opacity: 0.75; margin: 6px 0 0; } .mmft .error { border-left: 4px solid #b0440a; padding: 8px 12px; background: var(--bad-bg); }
.mmft table, .mmft th, .mmft td { border: 0 !important; } .mmft table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } .mmft th, .mmft td { text-align: right; padding: 5px 12px; border-bottom: 1px solid var(--border-color-primary) !important; }
.mmft th:first-child, .mmft td:first-child { text-align: left; } .mmft caption { text-align: left; font-weight: 650; padding: 8px 12px; }
"""


def head_html(models: Sequence[Model]) -> str:
    lines = "".join(f'<div class="about"><b class="{m.kind}">{escape(m.label)}</b> {escape(m.about)}</div>' for m in models)
    title = "Base against tuned" if models[0].label == "base" else "Run against run"
    return f'<div class="mmft"><h1>{title}</h1>{lines}</div>'


def sample_html(sample: Sample) -> str:
    """The pictures, the question and the references of a row of the data set."""
    shown = marked_html(sample, [("reference", "reference", sample.regions)]) or error_html("its picture cannot be opened")
    lines = [("prompt", sample.prompt_text or "(none)"), *(("reference", r) for r in sample.references), ("id", sample.id)]
    return shown + '<div class="mmft">' + "".join(f'<p class="line"><span class="tag">{k}</span>{escape(v)}</p>' for k, v in lines) + "</div>"


def marked_html(sample: Sample, drawn: Sequence[pictures.Marked]) -> str:
    """The pictures of a row with boxes over them; "" if none can be opened."""
    row: AnswerRecord = {"root": sample.root, "images": list(sample.images)}
    shown = pictures.shown_pictures(row, SIDE, len(sample.images), drawn)["pictures"]
    images = [f'<span class="framed"><img src="{p["uri"]}" alt=""{" class=small" if p["small"] else ""}>{p["overlay"]}</span>' for p in shown if p["uri"]]
    return f'<div class="mmft-pictures">{"".join(images)}</div>' if images else ""


def pictures_html(opened: Sequence[Image]) -> str:
    """Pictures as data, so that the page requests no file."""
    images = []
    for picture in opened:
        picture.thumbnail((SIDE, SIDE))
        small = ' class="small"' if max(picture.size) < pictures.SMALL else ""
        images.append(f'<img src="{pictures.data_uri(picture)}" alt=""{small}>')
    return f'<div class="mmft-pictures">{"".join(images)}</div>' if images else ""


def answers_html(models: Sequence[Model], state: Sequence[AnswerState] | None, references: Sequence[str], beams: int = 1, sample: Sample | None = None) -> str:
    """Every model's text so far (state None: nothing asked yet); a finished one is marked against the nearest reference.

    sample: what was asked; boxes in a finished answer are drawn over its pictures.
    """
    first = state[0] if state else (None, False)
    columns = []
    for i, model in enumerate(models):
        text, done = state[i] if state else (None, False)
        badge = body = ""
        if state is None:
            body = '<span class="wait">the answer comes here</span>'
        elif text is None or not done:
            waits = text is None and i > 0 and not state[i - 1][1]
            wait = "waits for its turn" if waits else f"searching with {beams} beams, shown at the end" if beams > 1 else "writing"
            body = f'{escape(text)}<span class="cursor"></span>' if text else f'<span class="wait">{wait} ...</span>'
        else:
            against = answers.nearest_reference(text, references) if references else (first[0] or "") if i and first[1] else ""
            body = "".join(escape(p) if kind == "same" else f'<mark class="{kind}">{escape(p)}</mark>' for kind, p in answers.difference(text, against))
            body = body or '<span class="wait">nothing written</span>'
            kind, mark, words = verdict(text, references) if references else ("none", "", "the same text" if i and text == first[0] else "")
            body += boxes_html(model, text, sample) if sample is not None else ""
            badge = f'<span class="verdict {kind}">{mark} {escape(words)}</span>' if words else ""
        columns.append(f'<div class="mmft-answer {model.kind}"><header><span>{escape(model.label)}</span>{badge}</header><div class="text">{body}</div></div>')
    return f'<div class="mmft"><div class="mmft-columns">{"".join(columns)}</div>{legend(references) if state and all(d for _, d in state) else ""}</div>'


def boxes_html(model: Model, text: str, sample: Sample) -> str:
    """The pictures with the boxes of an answer and of the reference; "" for an answer without boxes."""
    found = model.opened.collator.regions_in(text, sample)
    return marked_html(sample, [("reference", "reference", sample.regions), (model.kind, model.label, found)]) if found else ""


def legend(references: Sequence[str]) -> str:
    """The references, and what the marks mean."""
    lines = "".join(f'<p class="line"><span class="tag">reference</span>{escape(r)}</p>' for r in references)
    what = "Against the nearest reference" if references else "Against the first answer"
    return f'{lines}<p class="key">{what}: <mark>word that is not in it</mark> <mark class="missing">word that is missing</mark></p>'


def verdict(text: str, references: Sequence[str]) -> Verdict:
    return answers.verdict({"prediction": text, "references": list(references)})


def error_html(text: str) -> str:
    return f'<div class="mmft"><div class="error">{escape(text)}</div></div>'


def parameters_html(models: Sequence[Model]) -> str:
    """Parameters by part, from each run's own plan; the base has the same ones without the adapter."""
    tables = []
    for model in models:
        if model.base or model.opened.run is None:
            continue
        plan = cast(PlanReport, read_json(model.opened.run / "lora_plan.json"))
        rows = "".join(
            f"<tr><td>{escape(r['part'])}</td><td>{r['adapted']}</td><td>{escape(r['r'])}</td><td>{r['trainable']}</td><td>{r['total']}</td><td>{r['share']}</td></tr>"
            for r in plan_rows(plan)
        )
        total = f"<tr><td><b>all</b></td><td></td><td></td><td><b>{numbers.count(plan.get('trainable_parameters'))}</b></td><td><b>{numbers.count(plan.get('total_parameters'))}</b></td><td></td></tr>"
        head = "<tr><th>part</th><th>linear layers adapted</th><th>r</th><th>trained</th><th>parameters</th><th>share</th></tr>"
        tables.append(f"<table><caption>{escape(model.label)}</caption>{head}{rows}{total}</table>")
    return f'<div class="mmft">{"".join(tables)}</div>'
