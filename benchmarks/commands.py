"""Every command the benchmark runs, in one place: what a user of mmft types, what the scripts beside are told, what peers are told."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fixture import PROMPT, SIDE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LAYERS = {
    "qwen2vl": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llava": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "blip2": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
RATES = {"qwen2vl": 1e-3, "llava": 1e-3, "blip2": 1e-4}  # at higher rates BLIP-2's fixture multiplies rounding, see fixture.quieten
# Scripts by contender; a peer is run by the python of its own environment.
SCRIPTS = {
    "plain": "plain.py", "hand": "hand.py", "hand_merged": "hand.py",
    "trl": "trl_sft.py", "llamafactory": "llamafactory_sft.py", "swift": "swift_sft.py",
    "swift_best": "swift_sft.py", "llamafactory_best": "llamafactory_sft.py", "llamafactory_packed": "llamafactory_sft.py",
}  # fmt: skip
PEERS = ("trl", "llamafactory", "swift")
# What a peer can do against padding on a CPU, over rows of very different length.
VARIANTS = {"swift": ("swift_best",), "llamafactory": ("llamafactory_best", "llamafactory_packed")}


@dataclass(frozen=True)
class Work:
    """One training that every contender is to do alike. lr falls linearly to 0; AdamW without decay, clip at 1, fp32, no dropout."""

    family: str
    model: str
    rows: str
    epochs: int = 2
    batch: int = 2
    accumulation: int = 2
    lr: float = 1e-3
    r: int = 16
    alpha: int = 32
    seed: int = 42
    checkpointing: bool = False
    skewed: bool = False  # rows of skewed.py, each with a question of its own
    layers: tuple[str, ...] = ()  # that get an adapter; all of the language model's if empty
    weight: float | None = None  # of the second half of the rows, where the first half has 1: rows are drawn by mmft's mix; None: each comes once an epoch

    @property
    def prompt(self) -> str:
        return "" if self.family == "blip2" or self.skewed else PROMPT

    @property
    def targets(self) -> list[str]:
        return list(self.layers) or LAYERS[self.family]


@dataclass
class Command:
    """Words to run, and the directory its result is read from. `home`: mmft's output_dir, where caches lie."""

    name: str
    words: list[str]
    out: Path
    mmft: bool = False
    runs: list[Path] = field(default_factory=list)
    sweep: Path | None = None  # whose plan names the runs

    def finished_runs(self) -> list[Path]:
        """The run directories of mmft, of a sweep in the order of its points."""
        if self.sweep is None:
            return self.runs
        plan = json.loads((self.sweep / "plan.json").read_text(encoding="utf-8"))
        return [self.sweep / point["name"] for point in plan["points"]]


@functools.cache
def mmft_keys() -> frozenset[str]:
    """The top-level keys of the mmft that is here."""
    shown = subprocess.run([sys.executable, "-m", "mmft", "--cfg", "job"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(line.split(":")[0] for line in shown.splitlines() if line[:1].isalpha())


SWEPT = {"r": "lora.r", "layers": "lora.target_modules", "weight": "data.sources.second.weight"}  # mmft's keys of fields of Work


def mmft(work: Work, out: Path, home: Path, cache: str = "auto", sweep: str = "", points: Sequence[Any] = (), more: Sequence[str] = ()) -> Command:
    """`python -m mmft ...` into `out`; with `points`, a sweep over the field `sweep` of the work (`home`/sweeps/NAME). more: further words."""
    words = [
        f"model={work.family}", f"model.path={work.model}", "model.device=cpu", "model.dtype=fp32",
        *(table("data", work.rows, work) if work.weight is None else mixed(work)), "evaluation.split=null", "logger=none",
        f"lora.lora_alpha={work.alpha}", "lora.lora_dropout=0",
        f"trainer.num_train_epochs={work.epochs}", f"trainer.per_device_train_batch_size={work.batch}",
        f"trainer.gradient_accumulation_steps={work.accumulation}", f"trainer.learning_rate={work.lr}",
        "trainer.lr_scheduler_type=linear", "trainer.warmup_steps=0", "trainer.logging_steps=1",
        f"trainer.gradient_checkpointing={str(work.checkpointing).lower()}", f"seed={work.seed}", f"output_dir={home}",
    ]  # fmt: skip
    if work.family == "qwen2vl":
        words += [f"model.processor={{min_pixels:{56 * 56},max_pixels:{SIDE * SIDE}}}"]  # as the fixture's processor; mmft's own yaml would take larger ones
    if "vision_cache" in mmft_keys():
        words += [f"vision_cache={cache}"]
    words += more
    own = {"r": work.r, "layers": work.targets, "weight": work.weight}
    words += [f"{key}={written(own[name])}" for name, key in SWEPT.items() if name != sweep and own[name] is not None]
    if points:
        words += [f"{SWEPT[sweep]}={','.join(map(written, points))}", f"name={out.name}"]
        return Command("mmft", ["-m", "mmft", "-m", *words], out, True, sweep=home / "sweeps" / out.name)
    return Command("mmft", ["-m", "mmft", *words, f"run_dir={out / 'run'}"], out, True, [out / "run"])


def table(at: str, rows: str, work: Work) -> list[str]:
    """The words of a table of rows at the key `at`."""
    words = [f"{at}=table", f"{at}.path={rows}", f"{at}.splits.validation=0"]
    if work.skewed:
        words += [f"{at}.columns={{image: image, text: text, prompt: prompt}}", f"{at}.text_only=true"]
    return words + ([f"{at}.prompt={work.prompt}"] if work.prompt else [])


def halves(rows: str) -> dict[Path, int]:
    """The files of the first and the second half of the rows, which this writes, and how many rows each has."""
    file = Path(rows)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    own = {file.with_name("first.jsonl"): lines[: len(lines) // 2], file.with_name("second.jsonl"): lines[len(lines) // 2 :]}
    for path, part in own.items():
        if not path.exists():  # a prepared set knows the time of its file
            path.write_text("".join(part), encoding="utf-8")
    return {path: len(part) for path, part in own.items()}


def mixed(work: Work) -> list[str]:
    """The words of a mix of both halves, with as many draws in an epoch as there are rows."""
    files = halves(work.rows)
    sources = [word for path in files for word in table(f"data.sources.{path.stem}", str(path), work)]
    return ["data=mix", f"data.draws={sum(files.values())}", *sources]


def drawn(work: Work) -> list[int]:
    """The rows that mmft draws from this mix in all epochs, in order: what a plain process of the same weight trains on."""
    from mmft.data.mixing import mixing
    from mmft.training.sampling import epoch_order

    sizes = {path.stem: count for path, count in halves(work.rows).items()}
    draws = mixing(sizes, {"first": None, "second": work.weight}, sum(sizes.values()))
    return [row for epoch in range(work.epochs) for row in epoch_order(sum(sizes.values()), draws, work.seed, epoch)]


def written(value: Any) -> str:
    """A value as a word of the command line has it."""
    return str(value) if isinstance(value, (int, float)) else f"[{','.join(value)}]"


def script(name: str, work: Work, out: Path) -> Command:
    """A script of contenders/ with its task.json written to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    task: dict[str, Any] = dataclasses.asdict(work) | {"prompt": work.prompt, "targets": work.targets, "out": str(out)}
    task |= {"merged": name == "hand_merged", "grouped": name.endswith("_best"), "packed": name.endswith("_packed"), "drawn": drawn(work) if work.weight is not None else None}
    (out / "task.json").write_text(json.dumps(task, indent=1), encoding="utf-8")
    return Command(name, [str(HERE / "contenders" / SCRIPTS[name]), str(out / "task.json")], out)


def watched(command: Command, report: Path, script: str = "watch.py") -> Command:
    """The same command under contenders/watch.py, which writes what reached the model to `report`, or under another such script."""
    return dataclasses.replace(command, words=[str(HERE / "contenders" / script), str(report), *command.words])
