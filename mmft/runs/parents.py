"""The adapters that a run builds on: the one it starts from, and those that are merged into its base below it."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from ..adapters.merge import merge_adapter
from ..common.errors import UserError
from ..common.files import read_json
from ..common.records import ModelIdentity, ParentRecord
from ..config.plain import to_plain
from ..models.families.base import Family
from ..models.hub import HUBS, Located
from ..models.load import Loaded, load_model
from .adapter import load_adapter
from .base_model import has_files_of
from .catalog import find_run
from .directory import Run
from .weights import adapter_hash, trained_weights, weights_hash

log = logging.getLogger("mmft")

START, BELOW, EXTENDED, COMBINED = "start", "below", "extended", "combined"  # what a parent is to a run
BELOW_MOVED = "model.adapters"  # may be given for a run: where the same adapters are now
CHAIN = "base_chain.json"  # beside an adapter that does not sit on a base alone: the base, and the adapters merged into it
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True)
class Parent:
    """An adapter that a run builds on, see ParentRecord.

    folder: of its files. base: what it was trained on; None if nothing says so but its adapter_config.json. below: the adapters merged
    into that base.
    """

    role: str
    path: str
    folder: Path
    run: str
    sha256: str
    base: ModelIdentity | None = None
    below: list[ParentRecord] = field(default_factory=list)
    steps: int | None = None

    def record(self) -> ParentRecord:
        return {"role": self.role, "path": self.path, "run": self.run, "sha256": self.sha256, "steps": self.steps}


def find_adapter(word: str, role: str, key: str, output_dir: str, hub: str = "huggingface") -> Parent:
    """The adapter that a word names: a run (also `last`, `best`, the beginning of its name), a folder with an adapter, or a hub's id.

    key: in messages. Raises UserError.
    """
    path = Path(word).expanduser()
    if not path.is_dir():
        try:
            path = find_run(word, output_dir)
        except UserError as error:
            if re.fullmatch(HUB_ID, word) and not path.exists():
                return _of_folder(word, _from_hub(word, key, hub), role)
            raise UserError(str(error).replace("run=", f"{key}=", 1)) from None
    if (path / "snapshot.yaml").is_file():
        folder, full = trained_weights(Run(path), None)
        if full:
            raise UserError(f"{key}={word}: the whole model was trained there, so there is no adapter; model.path={folder.as_posix()} goes on with the model")
        return _of_run(path.as_posix(), folder, path, role)
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"{key}={word}: is neither a run nor a folder with an adapter (no snapshot.yaml, no adapter_config.json)")
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return _of_run(path.as_posix(), path, home, role) if (home / "snapshot.yaml").is_file() else _of_folder(path.as_posix(), path, role)


def _of_run(path: str, folder: Path, run: Path, role: str) -> Parent:
    env, summary = read_json(run / "env.json"), read_json(run / "summary.json")
    below = [p for p in env.get("parents") or () if p.get("role") == BELOW]
    step = folder.name.removeprefix("checkpoint-")
    steps = int(step) if step.isdigit() else summary.get("steps")
    return Parent(role, path, folder, run.resolve().name, adapter_hash(folder), env.get("model"), below, steps)


def _of_folder(path: str, folder: Path, role: str) -> Parent:
    chain = read_json(folder / CHAIN)
    return Parent(role, path, folder, "", adapter_hash(folder), chain.get("base"), chain.get("below") or [])


def _from_hub(name: str, key: str, hub: str) -> Path:
    """The folder of a hub's adapter, downloaded if needed."""
    files = ["adapter_config.json", "adapter_model.safetensors", CHAIN]
    try:
        if hub == HUBS[1]:
            from modelscope import snapshot_download
        else:
            from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of requests, httpx, the hubs' clients or the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{key}={name}: no such folder or run, and the hub's adapter could not be downloaded: {reason}") from None


def find_below(words: Sequence[str], output_dir: str, hub: str = "huggingface") -> list[Parent]:
    """The adapters to merge into the base, the lowest first. One that was trained over others brings these. Raises UserError."""
    chain: list[Parent] = []
    for word in words:
        parent = find_adapter(str(word), BELOW, "model.adapters", output_dir, hub)
        have, need = [p.sha256 for p in chain], [record["sha256"] for record in parent.below]
        if need[: len(have)] != have:
            sits = " and ".join(record["path"] for record in parent.below) or "its base alone"
            raise UserError(
                f"model.adapters={word}: was trained over {sits}, and {chain[-1].path} would lie below it here; mmft combine adds adapters"
                " that stand side by side"
            )
        chain += [_known(record, parent.folder, f"model.adapters={word}", output_dir, hub) for record in parent.below[len(have) :]]
        if parent.sha256 not in [p.sha256 for p in chain]:
            chain.append(parent)
    return chain


def _known(record: ParentRecord, child: Path, where: str, output_dir: str, hub: str, word: str | None = None) -> Parent:
    """The adapter of a record, which must be what it was. child: a folder near which it lies if both were moved."""
    word = word or record["path"]
    places = [word] + [(home / Path(word).name).as_posix() for home in list(child.resolve().parents)[:3] if not Path(word).is_dir()]
    place = next((p for p in places if Path(p).is_dir()), word)
    try:
        if record.get("role") == EXTENDED:
            now = extension_of(Path(place))
            parent = Parent(EXTENDED, word, Path(place), now["run"], now["sha256"])
        else:
            parent = find_adapter(place, record.get("role", BELOW), where.partition("=")[0], output_dir, hub)
    except UserError as error:
        advice = f"; if it was moved, {BELOW_MOVED}=[...] names its place" if record.get("role") == BELOW else ""
        raise UserError(f"{where}: builds on {word}, which is missing or not readable ({error}){advice}") from None
    if parent.sha256 != record["sha256"]:
        raise UserError(f"{where}: builds on {word}, whose weights have changed since (then {record['sha256'][:12]}, now {parent.sha256[:12]})")
    return parent


def resolve_names(cfg: DictConfig) -> None:
    """Replace short names in lora.start and model.adapters by the folders they mean, in place, and add what these sit on. Raises UserError."""
    output_dir, hub = str(cfg.output_dir), str(cfg.model.get("hub") or HUBS[0])
    start, below = cfg.lora.get("start"), cfg.model.get("adapters")
    if start is not None:
        cfg.lora.start = find_adapter(str(start), START, "lora.start", output_dir, hub).path
    if below:
        cfg.model.adapters = [p.path for p in find_below(to_plain(below), output_dir, hub)]


def check_below(below: Sequence[Parent], family: Family, located: Located) -> None:
    """Check that adapters to be merged belong to the base model. Raises UserError."""
    if below and family.quantization and any(family.quantization.get(k) for k in ("load_in_8bit", "load_in_4bit")):
        raise UserError("model.adapters: merged into quantised weights they would be rounded; mmft merge run=... dtype=bf16 writes a model to quantise")
    for parent in below:
        check_base(parent, located, f"model.adapters={parent.path}")


def check_sits_on(start: Parent, located: Located, below: Sequence[Parent]) -> None:
    """Check that the adapter to go on with was trained on this base, over the same merged adapters. Raises UserError."""
    where = f"lora.start={start.path}"
    check_base(start, located, where)
    if [p["sha256"] for p in start.below] != [p.sha256 for p in below]:
        wanted = f"model.adapters=[{','.join(p['path'] for p in start.below)}]" if start.below else "leave out model.adapters"
        raise UserError(f"{where}: was trained over {'merged adapters' if start.below else 'the base alone'}, and this run is not; {wanted}")


def check_base(parent: Parent, located: Located, where: str) -> None:
    """Raises UserError if an adapter was made for another base model than the one at hand."""
    if parent.base and parent.base.get("revision"):
        with contextlib.suppress(UserError):  # a commit that is not in the local cache cannot be compared
            if has_files_of(located, parent.base, parent.path):
                return
        name = str(parent.base.get("path"))
        raise UserError(f"{where}: was trained on {name} ({str(parent.base.get('revision'))[:19]}), and model.path={located.path} has other files ({located.revision[:19]})")
    named = read_json(parent.folder / "adapter_config.json").get("base_model_name_or_path")
    if not named or named in (located.path, str(located.folder)) or Path(str(named)).name == Path(located.path.split(":")[-1]).name:
        return
    raise UserError(f"{where}: was made for {named}, and this run has model.path={located.path}; a copy of that model in a folder of the same name is accepted")


def load_base(family: Family, located: Located, below: Sequence[Parent], full_training: bool = False) -> Loaded:
    """The base model with the adapters of `below` merged into its weights. Raises UserError."""
    loaded = load_model(family, full_training=full_training, located=located)
    for parent in below:
        if loaded.quantized:
            raise UserError(f"model.adapters={parent.path}: this base is quantised, and merged weights would be rounded; mmft merge run=... dtype=bf16 writes a plain model")
        hooks: list[Any] = []
        merged = merge_adapter(load_adapter(loaded.model, parent.folder, hooks=hooks))
        for hook in hooks:
            hook.remove()
        loaded.model = merged.to(loaded.dtype).eval()
        loaded.notes.append(f"{parent.path} is merged below ({parent.sha256[:12]})")
    loaded.below = [p.sha256 for p in below]
    return loaded


def below_of_run(run: Run, adapters: Sequence[str] | None, hub: str, output_dir: str) -> list[Parent]:
    """The adapters merged below a run's own, which must be what they were. Raises UserError that names one that is missing or has changed."""
    records = [p for p in recorded(run) if p.get("role") == BELOW]
    words = [str(w) for w in adapters or ()]
    if len(words) != len(records):
        raise UserError(f"run={run.path}: was trained over {len(records)} merged adapters, and {BELOW_MOVED} names {len(words)}")
    return [_known(record, run.path, f"run={run.path}", output_dir, hub, word) for record, word in zip(records, words)]


def start_of(run: Run, output_dir: str) -> Parent | None:
    """The adapter that a run started from (lora.start), which must be what it was; None if it began with a new one. Raises UserError."""
    record = next((p for p in recorded(run) if p.get("role") == START), None)
    return None if record is None else _known(record, run.path, f"run={run.path}", output_dir, HUBS[0])


def check_unchanged(run: Run, output_dir: str) -> None:
    """Raises UserError that names a parent of a run that is missing or has changed since."""
    for record in recorded(run):
        _known(record, run.path, f"run={run.path}", output_dir, HUBS[0])


def chain_of(env: dict[str, Any]) -> dict[str, Any] | None:
    """What base_chain.json says of an adapter, from its run's env.json; None if it sits on its base alone."""
    below = [p for p in env.get("parents") or () if p.get("role") == BELOW]
    return {"base": env.get("model"), "below": below} if below else None


def extension_of(run: Path) -> ParentRecord:
    """The record of a finished run in the run that continues it."""
    folder, full = trained_weights(Run(run), None)
    steps = read_json(run / "summary.json").get("steps")
    return {"role": EXTENDED, "path": run.as_posix(), "run": run.resolve().name, "sha256": _trained_hash(folder, full), "steps": steps}


def extended(run: Run | Path) -> ParentRecord | None:
    """The run that this one continues, from its parent.json; None if it began by itself."""
    record = read_json((run.path if isinstance(run, Run) else run) / "parent.json").get(EXTENDED)
    return cast("ParentRecord | None", record)


def _trained_hash(folder: Path, full: bool) -> str:
    return str(weights_hash(folder.parent)) if full else adapter_hash(folder)


def check_same(run: Run, found: Sequence[Parent]) -> None:
    """Raises UserError unless the adapters at hand are those that a stopped run began with; a run that was moved is named where it is now."""
    for role in (START, BELOW):
        then = [record for record in recorded(run) if record.get("role") == role]
        now = [parent for parent in found if parent.role == role]
        for record, parent in zip(then, now):
            if record["sha256"] != parent.sha256:
                raise UserError(f"run={run.path}: builds on {parent.path}, whose weights have changed since (then {record['sha256'][:12]}, now {parent.sha256[:12]})")
        if len(then) != len(now):
            raise UserError(f"run={run.path}: began with {len(then)} adapters ({role}), and its config names {len(now)}")


def recorded(run: Run | Path) -> list[ParentRecord]:
    """The parents in a run's env.json."""
    path = run.path if isinstance(run, Run) else run
    return cast("list[ParentRecord]", read_json(path / "env.json").get("parents") or [])
