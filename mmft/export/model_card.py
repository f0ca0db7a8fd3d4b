"""Write the model card (README.md) of an adapter, a trained or a merged model, from the files of a run directory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from ..adapters.methods import LORA, shown
from ..common.files import read_json, read_text, read_yaml
from ..common.records import Environment, ModelIdentity, ParentRecord, PlanReport, Summary
from ..reports import numbers
from ..reports.lineage import lineage
from ..reports.tables import answer_notes, metric_rows, source_table
from ..runs.directory import Run

KINDS = {"adapter": "METHOD adapter", "model": "fine-tuned model", "merged": "fine-tuned model (a METHOD adapter merged into its base)"}  # METHOD: LoRA, VeRA, ...
ARTICLES = {"HRA": "An", "IA3": "An", "OFT": "An"}


def write_card(run: Run) -> Path | None:
    """Write README.md beside a run's trained weights, in place of peft's; None if nothing was saved."""
    kind = next((k for k in ("adapter", "model") if (run / k).is_dir()), None)
    return run.write_text(f"{kind}/README.md", card(run.path, kind)) if kind else None


def card(run: Path, kind: str, notes: Sequence[str] = ()) -> str:
    """The card's text. kind: adapter | model | merged. notes: further lines about how the weights were made."""
    summary = cast("Summary", read_json(run / "summary.json"))
    env = cast("Environment", read_json(run / "env.json"))
    plan = cast("PlanReport", read_json(run / "lora_plan.json"))
    settings = read_yaml(run / "snapshot.yaml")
    base: ModelIdentity = env.get("model") or {}
    method = plan.get("adapter") or "LoRA"
    parts = [
        _front_matter(kind, base, method),
        f"# {_plain(summary.get('name') or run.resolve().name)}",
        f"{ARTICLES.get(method, 'A') if kind == 'adapter' else 'A'} {KINDS[kind].replace('METHOD', method)} of {_base_name(base)}, made with mmft.",
        "## Use", _use(kind, base, [p for p in env.get("parents") or () if p.get("role") == "below"]),
        "## Figures", _figures(summary),
        "## Data", _data(summary, env, settings),
        "## Training", _training(run, summary, env, plan, settings),
        *(["## Builds on", _builds_on(run)] if lineage(run) else []),
        *(["## How these weights were made", _list(notes)] if notes else []),
        "## Limits", _limits(summary),
        "## Licence", _licence(base),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _front_matter(kind: str, base: ModelIdentity, method: str) -> str:
    """The fields that a hub reads. The licence is unknown; hubs accept `other` until somebody states one."""
    fields: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers", "pipeline_tag": "image-text-to-text"}
    if base.get("hub") in ("huggingface", "modelscope"):  # the name under which a hub links the base
        fields |= {"base_model": base["path"], "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    fields["tags"] = ["mmft", *([method.lower()] if kind != "model" else [])]
    fields |= {"license": "other", "license_name": "not-stated", "license_link": "LICENSE"}
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) + "---"


def _base_name(base: ModelIdentity) -> str:
    path = str(base.get("path") or "an unknown base")
    if base.get("hub") == "huggingface":
        return f"[{path}](https://huggingface.co/{path}) (commit `{str(base.get('revision'))[:12]}`)"
    if base.get("hub") == "modelscope":
        return f"[{path}](https://modelscope.cn/models/{path}) (files `{str(base.get('revision'))[:19]}`)"
    where = "built into mmft" if base.get("hub") == "mmft" else "a local folder"
    return f"`{Path(path).name}` ({where}, files `{str(base.get('revision'))[:19]}`)"


def _use(kind: str, base: ModelIdentity, below: Sequence[ParentRecord] = ()) -> str:
    path = base.get("path") if base.get("hub") in ("huggingface", "modelscope") else "PATH_TO_THE_BASE_MODEL"
    if kind == "adapter":
        lines = [
            "from peft import PeftModel", "from transformers import AutoModelForImageTextToText, AutoProcessor", "",
            f'model = AutoModelForImageTextToText.from_pretrained("{path}", dtype="auto", device_map="auto")',
            *(f'model = PeftModel.from_pretrained(model, "THE_ADAPTER_OF_{_adapter_name(p.get("run") or p.get("path"))}").merge_and_unload()  # {str(p.get("sha256"))[:12]}' for p in below),
            'model = PeftModel.from_pretrained(model, "THIS_FOLDER")',
            'processor = AutoProcessor.from_pretrained("THIS_FOLDER")  # image limits and chat template of the training',
        ]  # fmt: skip
    else:
        lines = [
            "from transformers import AutoModelForImageTextToText, AutoProcessor", "",
            'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", dtype="auto", device_map="auto")',
            'processor = AutoProcessor.from_pretrained("THIS_FOLDER")',
        ]  # fmt: skip
    return "```python\n" + "\n".join(lines) + "\n```"


def _figures(summary: Summary) -> str:
    if not metric_rows(summary):
        return "Not measured: the run held no rows out." + "".join(f"\n\n{_table(summary, kept)}" for kept in summary.get("keep") or {})
    own = f"On {summary.get('held_out_samples')} held-out rows, none of whose pictures was trained on. Fractions of 1; CIDEr goes to 10.\n\n{_table(summary)}"
    if (by_source := source_table(summary)) is not None:
        head = ["", *by_source["sources"]]
        lines = [head, ["---"] + ["---:"] * len(by_source["sources"]), *([label, *cells] for label, _, cells in by_source["rows"])]
        own += "\n\nBy source:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([own, *(f"What was to be kept, `{kept}`:\n\n{_table(summary, kept)}" for kept in summary.get("keep") or {})])


def _table(summary: Summary, kept: str | None = None) -> str:
    lines = ["| metric | base | tuned | change | 95 % interval | p |", "|---|---:|---:|---:|---:|---:|"]
    for r in metric_rows(summary, kept):
        name = "loss (lower is better)" if r["name"] == "eval_loss" else r["name"]
        lines.append(f"| {name} | {r['base']} | {r['tuned']} | {r['change']} | {r['interval']} | {r['p']} |")
    return "\n".join([*lines, "", *answer_notes(summary, kept)]).rstrip()


def _data(summary: Summary, env: Environment, settings: dict[str, Any]) -> str:
    data = settings.get("data") or {}
    lines = [f"set: `{_plain(data.get('name'))}`"] if data.get("name") else []
    if data.get("dataset"):
        lines.append(f"source: `{_plain(data['dataset'])}`" + (f" on {_plain(data['hub'])}" if data.get("hub") else ""))
    for name, source in (data.get("sources") or {}).items():
        trained = ((summary.get("sources") or {}).get(name) or {}).get("rows")
        lines.append(f"source {name}: `{_plain(source.get('dataset') or source.get('name'))}`, {numbers.count(trained)} rows trained")
    fingerprint = (env.get("data") or {}).get("fingerprint") or summary.get("data_fingerprint")
    lines.append(f"fingerprint of rows and pictures: `{fingerprint or 'unknown'}`")
    return _list(lines)


def _training(run: Path, summary: Summary, env: Environment, plan: PlanReport, settings: dict[str, Any]) -> str:
    lora, packages = settings.get("lora") or {}, env.get("packages") or {}
    words = [w for w in (read_text(run / "overrides.txt") or "").splitlines() if w and not w.startswith(("output_dir=", "run_dir="))]
    if plan.get("method") == "lora":
        names = shown(str(lora.get("method") or LORA), lora)
        adapted = ", ".join(f"{r.get('modules')} of {r.get('linear')} {r.get('part')}" for r in plan.get("rows") or () if r.get("modules"))
        what = f"{plan.get('adapter') or 'LoRA'}, scope {plan.get('scope')}: {_plain(', '.join(names))}; linear layers adapted: {adapted}"
        if plan.get("modules_to_save"):
            what += f"; trained whole: {_plain(', '.join(plan['modules_to_save']))}"
    else:
        what = f"full training, scope {plan.get('scope', 'all')}"
    quantised = {k: v for k, v in ((settings.get("model") or {}).get("quantization") or {}).items() if v}
    lines = [
        what,
        *([f"base held in {_plain(quantised)}"] if quantised else []),
        f"trainable parameters: {numbers.count(plan.get('trainable_parameters'))} of {numbers.count(plan.get('total_parameters'))}",
        f"steps {summary.get('steps')}, effective batch {summary.get('effective_batch_size')}, learning rate"
        f" {(settings.get('trainer') or {}).get('learning_rate')}, seed {summary.get('seed')}, {env.get('dtype')} on {env.get('device')}",
        "versions: " + ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if packages.get(name)) + f", mmft {env.get('mmft')}",
    ]
    return f"```bash\nmmft {_plain(' '.join(map(without_folders, words)))}\n```\n\n" + _list(lines)


def _builds_on(run: Path) -> str:
    rows = [f"`{_adapter_name(a['name'])}`: {a['what']} in `{_plain(a['of'])}`, {a['steps']} steps, sha256 `{a['sha256']}`" for a in lineage(run)]
    return "The oldest first.\n\n" + _list(rows)


def _adapter_name(name: object) -> str:
    """A run's name or a hub's id as it is, of a folder its last part."""
    return _plain(Path(str(name)).name if str(name).startswith(("/", "~")) else name)


def _limits(summary: Summary) -> str:
    if summary.get("metrics"):
        return (
            "The figures above are all that was measured: rows held out of the same set, answered with the generation settings stored beside the"
            " weights. Other pictures, other prompts and other languages were not tried, and neither were safety and bias."
        )
    return "Nothing was measured on held-out rows."


def _licence(base: ModelIdentity) -> str:
    name = Path(str(base.get("path"))).name if base.get("hub") == "local" else base.get("path")
    return (
        f"Not stated by the run. These weights derive from {name or 'the base model'} and from the training data; whoever publishes them"
        " follows both licences and writes the result into `license`, `license_name` and `license_link` above."
    )


def without_folders(word: str) -> str:
    """An override with an absolute path cut to its last part: a card is published and must not show a home directory."""
    key, equals, value = word.partition("=")
    unquoted = value.strip("\"'")
    if re.match(r"(/|~|[A-Za-z]:[\\/])", unquoted):
        value = ".../" + re.split(r"[\\/]", unquoted.rstrip("\\/"))[-1]
    return f"{key}{equals}{value}"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: Any) -> str:
    """Text on one line without backticks, which would end a code block."""
    return " ".join(str(value).split()).replace("`", "'")
