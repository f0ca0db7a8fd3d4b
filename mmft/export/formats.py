"""Other forms of a merged model: 8 or 4 bits, which transformers saves with bitsandbytes, and GGUF through llama.cpp's own converter."""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, nearest
from ..models.quantization import why_not_quantised
from ..system import startup
from .merge_check import Reference, answer_logits, largest_difference

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BITS: dict[str, dict[str, Any]] = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
GGUF = "gguf"
KINDS = (*BITS, GGUF)
LLAMA_CPP = "MMFT_LLAMA_CPP"  # a checkout of llama.cpp; from the environment, because a config cannot name a program to start
CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
HOURS = 2  # a converter that takes longer is ended


@dataclass(frozen=True)
class Export:
    """A model in another form. facts: lines for the terminal."""

    path: Path
    facts: dict[str, str]


def chosen(export: Any, out: Path) -> list[str]:
    """The forms of export=. Raises UserError for an unknown one, and for one whose files exist already."""
    kinds = [] if export is None else [str(kind) for kind in (export if isinstance(export, list) else [export])]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"export={kind}: no such form.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}.")
        for path in [place(out, kind), projector(out)] if kind == GGUF else [place(out, kind)]:
            if path.exists():
                raise UserError(f"export={kind}: {path} exists already; a merge never writes over anything (choose a new out=...)")
    if GGUF in kinds:
        converter()
    return kinds


def place(out: Path, kind: str) -> Path:
    """OUT-nf4, a folder; OUT.gguf, a file."""
    return out.with_name(f"{out.name}.gguf" if kind == GGUF else f"{out.name}-{kind}")


def projector(out: Path) -> Path:
    """The file of the vision part, which llama.cpp reads apart."""
    return out.with_name(f"{out.name}.mmproj.gguf")


# --- bits -----------------------------------------------------------------------------------------------------------


def quantise(merged: Path, kind: str, device: str, dtype: torch.dtype, attention: str | None, reference: Reference) -> Export:
    """Quantise a merged model, save it, load it again and compare its logits with the reference's. Raises UserError."""
    from transformers import BitsAndBytesConfig

    startup.with_bitsandbytes()
    if reason := why_not_quantised(device):
        raise UserError(f"export={kind}: is not possible here ({reason}); {merged} is complete without it")
    out = place(merged, kind)
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        model = load(merged, device, dtype, attention, quantization_config=BitsAndBytesConfig(**BITS[kind], **({"bnb_4bit_compute_dtype": dtype} if kind == "nf4" else {})))
        model.save_pretrained(staging)  # before it computes anything: on a CPU bitsandbytes rearranges the weights at the first pass
        logits = answer_logits(model, reference.inputs)
        del model
        gc.collect()
        for file in merged.iterdir():  # the processor, the chat template, the settings of generation
            if file.is_file() and file.name not in ("config.json", "merge.json", "README.md") and "safetensors" not in file.name:
                shutil.copy2(file, staging / file.name)
        again = load(staging, device, dtype, attention)
        saved = answer_logits(again, reference.inputs)
        del again
        gc.collect()
        change = largest_difference(logits, saved)
        if change > 1e-3 * reference.largest:
            raise UserError(f"export={kind}: the saved model differs from the one in memory by {change:.3g} of a logit; nothing was kept of it, {merged} is complete")
        gap = largest_difference(reference.logits, saved)
        same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(reference.logits, saved, strict=True)) / reference.answer_tokens
        record: dict[str, Any] = {"from": merged.name, "kind": kind, "answer_tokens": reference.answer_tokens, "largest_difference": gap, "same_likeliest_token": same, "largest_logit": reference.largest,
                  "adapter_moves_logits_by": reference.effect, "bytes": size(staging), "merged_bytes": size(merged)}  # fmt: skip
        (staging / "quantised.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")
        os.replace(staging, out)
    except OSError as error:
        raise UserError(f"export={kind}: {out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    from ..reports import numbers

    facts = {
        kind: f"{out} ({numbers.memory(record['bytes'] / 2**20)}; merged {numbers.memory(record['merged_bytes'] / 2**20)})",
        f"{kind} against base + adapter": f"logits differ by up to {gap:.3g} (largest {reference.largest:.3g}); the likeliest token is the same for {100 * same:.1f} % of {reference.answer_tokens}",
    }
    return Export(out, facts)


def load(folder: Path, device: str, dtype: torch.dtype, attention: str | None, **options: Any) -> PreTrainedModel:
    """A saved model through plain transformers."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention, device_map={"": device}, **options).eval()


def size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# --- GGUF -----------------------------------------------------------------------------------------------------------


def converter() -> Path | None:
    """llama.cpp's converter; None if no checkout is named. Raises UserError for a folder without it."""
    folder = os.environ.get(LLAMA_CPP)
    if not folder:
        return None
    path = Path(folder).expanduser() / CONVERTER
    if not path.is_file():
        raise UserError(f"{LLAMA_CPP}={folder}: holds no {CONVERTER}; name a checkout of llama.cpp")
    return path


def gguf_commands(script: Path | str, merged: Path, dtype: str) -> list[list[str]]:
    """The commands that write the language model and the vision part."""
    head = [sys.executable if isinstance(script, Path) else "python", str(script), str(merged), "--outtype", OUTTYPES[dtype]]
    return [[*head, "--outfile", str(place(merged, GGUF))], [*head, "--mmproj", "--outfile", str(projector(merged))]]


def to_gguf(merged: Path, dtype: str) -> Export:
    """Let llama.cpp's converter write OUT.gguf and OUT.mmproj.gguf; without a checkout, say the commands. Raises UserError."""
    script = converter()
    if script is None:
        commands = [shlex.join(command) for command in gguf_commands(f"LLAMA_CPP/{CONVERTER}", merged, dtype)]
        return Export(merged, {"gguf": f"run {' and '.join(commands)}, or name a checkout of llama.cpp in {LLAMA_CPP}"})
    facts = {}
    for command in gguf_commands(script, merged, dtype):
        file = Path(command[-1])
        _convert(command, file, merged)
        facts["gguf" if file == place(merged, GGUF) else "gguf of the vision part"] = f"{file} ({file.stat().st_size / 2**20:.1f} MB)"
    return Export(place(merged, GGUF), facts)


def _convert(command: Sequence[str], file: Path, merged: Path) -> None:
    """Run the converter; a file that it left unfinished is removed. Raises UserError."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=HOURS * 3600, check=False)
        problem = "" if done.returncode == 0 else next((line for line in reversed([*done.stdout.splitlines(), *done.stderr.splitlines()]) if line.strip()), f"code {done.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if not problem and not (file.is_file() and file.open("rb").read(4) == b"GGUF"):
        problem = "it wrote no GGUF file"
    if problem:
        file.unlink(missing_ok=True)
        raise UserError(f"export=gguf: llama.cpp's converter failed: {' '.join(problem.split())[:300]}; {merged} is complete, and this repeats it: {shlex.join(command)}")
