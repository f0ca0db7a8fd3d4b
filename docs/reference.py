"""Write the reference pages when the site is built: from conf/*.yaml with their comments, and from the classes that take the keys.

No key is listed here. A yaml file gives a key's default and comment; the type is the annotation in the class that the file's
`_target_` names; the libraries' keys are those of the installed versions (mmft/config/library_keys.py).
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mmft.common.errors import UserError
from mmft.config import key_table, library_keys
from mmft.config.comments import first_comment, keys_of
from mmft.config.groups import CONFIG_DIR
from mmft.config.guard.targets import parameters, resolve
from mmft.config.schema import LIVE

TITLES = {
    "task": "Verbs", "model": "Models", "collator": "Collators", "data": "Data sets", "lora": "LoRA", "trainer": "Trainer", "objective": "Objectives", "logger": "Loggers", "metrics": "Metrics",
    "experiment": "Experiments", "hydra": "Sweepers and launchers",
}  # fmt: skip
INTROS = {
    "task": "`mmft VERB key=value ...`; a verb's own keys are typed bare.",
    "model": "`model=NAME`, and then `model.KEY=VALUE`.",
    "collator": "A model chooses its collator; `collator=NAME` chooses another, `collator.KEY=VALUE` changes it.",
    "data": "`data=NAME`, and then `data.KEY=VALUE`. What each format looks like: [Your own data](../data.md).",
    "lora": "`lora=NAME`, and then `lora.KEY=VALUE`.",
    "objective": "`objective=NAME`, and then `objective.KEY=VALUE`. What they learn: [Preferences](../preferences.md), [Rewards](../rewards.md).",
    "trainer": "`trainer.KEY=VALUE`. The model group `tiny` brings the option `tiny`, every other model `default`.",
    "logger": "`logger=NAME`, and then `logger.KEY=VALUE`.",
    "metrics": "`metrics=[NAME,NAME]`, and then `metrics.NAME.KEY=VALUE`. What they measure: [Metrics](../metrics.md).",
    "experiment": "`experiment=NAME`: a preset over all groups. What is typed beside it wins over it.",
    "hydra": "`mmft -m hydra/sweeper=NAME`, `mmft -m hydra/launcher=NAME`, and then `hydra.sweeper.KEY=VALUE`, `hydra.launcher.KEY=VALUE`.",
}
# section -> (title, the class whose keys it takes, name -> annotation)
LIBRARIES = {
    "trainer": ("transformers.TrainingArguments", library_keys.training_arguments),
    "lora": ("peft.LoraConfig", library_keys.lora_config),
    "generation": ("transformers.GenerationConfig", library_keys.generation_config),
    "model.quantization": ("transformers.BitsAndBytesConfig", library_keys.quantization_config),
}


def code(text: str) -> str:
    """Text as inline code in a table cell."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"`{text}`" if text else ""


def cell(text: str) -> str:
    """A comment as prose in a table cell; `???` and <angles> are text, not markup."""
    for sign in ("|", "<", "*", "_", "[", "]", "$"):
        text = text.replace(sign, f"\\{sign}") if "`" not in text or sign == "|" else text
    return text


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def signature(target: Any) -> tuple[dict[str, str], dict[str, str]]:
    """(name -> annotation, name -> default) of a class's arguments; empty for null and for a class of a package that is not installed."""
    if target is None:
        return {}, {}
    try:
        built = resolve(target, "reference")
    except UserError:  # Hydra's launchers, which Hydra builds
        return {}, {}
    plain = inspect.signature(built).parameters
    shown = {True: "true", False: "false", None: "null"}
    defaults = {n: p.default for n, p in plain.items()}
    return parameters(built), {
        n: "" if d is inspect.Parameter.empty or callable(d) or "<" in repr(d) else shown.get(d, str(d)) if isinstance(d, (bool, type(None))) else str(d)
        for n, d in defaults.items()
    }


def bases_of(plain: dict[str, Any]) -> list[str]:
    """The entries of a file's defaults list, as they would be typed: `conversations`, `/collator=chat`, `/model=qwen2vl`."""
    keys = []
    for entry in plain.get("defaults", []):
        if entry != "_self_":
            named = str(entry) if isinstance(entry, str) else "=".join(map(str, *entry.items()))
            keys.append(re.sub(r"^override |@[^=]*", "", named))
    return keys


def option(file: Path, group: str, prefix: str, shared: dict[str, str]) -> str:
    """The section of one yaml file: its comment, its bases, its keys. shared: meanings of keys that other options explain."""
    text = file.read_text(encoding="utf-8")
    plain = yaml.safe_load(text) or {}
    is_base = file.stem.startswith("_")
    lines = [f"## Shared by several options: {file.stem}" if is_base else f"## {group}={file.stem}", cell(first_comment(text))]
    bases = bases_of(plain)
    inherited = [file.parent / f"{base}.yaml" for base in bases if (file.parent / f"{base}.yaml").is_file()]
    if bases:
        lines.append("Based on " + ", ".join(map(code, bases)) + (", which gives the keys that are not listed here." if inherited else "."))
    target = plain.get("_target_")
    if target:
        lines.append(f"Builds {code(target)}.")
    for base in inherited:
        target = target or (yaml.safe_load(base.read_text(encoding="utf-8")) or {}).get("_target_")
    kinds, defaults = signature(target)
    known = keys_of(text, prefix)
    rows = [
        (code(k.name), code(k.default), code(kinds.get(k.name.removeprefix(prefix), "")), cell(k.comment or shared.get(k.name, ""))) for k in known
    ]
    listed = {k.name.removeprefix(prefix).split(".")[0] for k in known} | set(LIVE)
    if not inherited:
        rows += [
            (code(prefix + name), code(defaults[name]), code(kind), cell(shared.get(prefix + name, "")))
            for name, kind in kinds.items() if name not in listed
        ]  # fmt: skip
    if rows:
        columns = [i for i in range(4) if i == 0 or any(row[i] for row in rows)]
        lines.append(table([tuple(row[i] for i in columns) for row in rows], tuple(("key", "default", "type", "meaning")[i] for i in columns)))
    return "\n\n".join(lines)


def group_page(group: str) -> str:
    """A group's page: every option, and the library's keys where the group takes them."""
    prefix = {"task": "", "experiment": "", "hydra": ""}.get(group, f"{group}.")
    page = [f"# {TITLES[group]}", INTROS[group]]
    files = sorted((CONFIG_DIR / group).glob("**/*.yaml"))
    meanings: dict[str, set[str]] = {}
    for key in (k for file in files if prefix for k in keys_of(file.read_text(encoding="utf-8"), prefix) if k.comment):
        meanings.setdefault(key.name, set()).add(key.comment)
    # where every explanation of a key is the same, options without one show it, too
    shared = {name: next(iter(texts)) for name, texts in meanings.items() if len(texts) == 1}
    for file in files:
        inner = file.relative_to(CONFIG_DIR / group).parent.as_posix()
        if group == "hydra" and inner == ".":
            continue  # Hydra's settings, which users do not change
        name = group if inner == "." else f"{group}/{inner}"
        page.append(option(file, name, f"hydra.{inner}." if group == "hydra" else prefix, shared))
    if group in LIBRARIES:
        page.append(library(group))
    if group == "model":
        page.append(library("model.quantization"))
    return "\n\n".join(page) + "\n"


def library(section: str) -> str:
    """Every key of a library's class in the installed version."""
    name, read = LIBRARIES[section]
    package = name.split(".")[0]
    keys = read()
    head = f"## Every key of {name}\n\nAs installed here ({package} {version(package)}); what each does is in that library's documentation."
    if not any(keys.values()):
        return f"{head}\n\n" + ", ".join(code(f"{section}.{key}") for key in keys) + "."
    return f"{head}\n\n" + table([(code(f"{section}.{key}"), code(kind)) for key, kind in keys.items()], ("key", "type"))


def top_page() -> str:
    """config.yaml: the keys that belong to no group."""
    text = (CONFIG_DIR / "config.yaml").read_text(encoding="utf-8")
    rows = [(code(k.name), code(k.default), cell(k.comment)) for k in keys_of(text)]
    lines = ["# Every key", "Made from the configuration files and the classes they name when this site was built.",
            "## The top level", table(rows, ("key", "default", "meaning")), library("generation"),
            "## The groups", "\n".join(f"- [{title}]({group}.md)" for group, title in TITLES.items())]  # fmt: skip
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(TITLES) + "\n```"
    return "\n\n".join([*lines, tree]) + "\n"


def keys_page() -> str:
    """docs/keys.md: the table of mmft/config/key_table.py, with its counts. Keys of all releases that the table knows."""
    page = ["# Keys of the libraries",
            "mmft accepts the keys of four classes of other libraries. Each is *effective* (a test sets it and sees that weights, answers or behaviour change),"
            " *managed* (mmft sets it; the last column names the key to use instead), or *unsupported* (refused at once, with the reason). The table is"
            " `mmft/config/key_table.py`; this page is written by `python docs/reference.py`."]  # fmt: skip
    tables = (("effective", key_table.EFFECTIVE), ("managed", key_table.MANAGED), ("unsupported", key_table.UNSUPPORTED))
    counts = [(code(f"{section}.*"), f"{package}.{name}", *(str(len(keys[section])) for _, keys in tables)) for section, (name, package) in key_table.CLASSES.items()]
    total = [str(sum(len(keys[section]) for section in key_table.CLASSES)) for _, keys in tables]
    page.append(table([*counts, ("all", "", *total)], ("keys", "class", "effective", "managed", "unsupported")))
    for section, (name, package) in key_table.CLASSES.items():
        rows = [(code(f"{section}.{key}"), kind, cell(key_table.status(section, key)[1])) for kind, keys in tables for key in keys[section]]
        page += [f"## {package}.{name}", table(rows, ("key", "status", "note"))]
    return "\n\n".join(page) + "\n"


def write(folder: Path) -> list[Path]:
    """Write all pages into `folder` and return their paths; pages that did not change are not written."""
    folder.mkdir(exist_ok=True)
    pages = {"index": top_page(), **{group: group_page(group) for group in TITLES}}
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return [folder / f"{name}.md" for name in pages]


if __name__ == "__main__":
    (Path(__file__).parent / "keys.md").write_text(keys_page(), encoding="utf-8")
