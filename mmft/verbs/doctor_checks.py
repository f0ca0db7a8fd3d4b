"""Checks of the machine and its installation, before anything is trained: one Finding per check."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OK, LESS, BROKEN = "ok", "less", "broken"  # LESS: mmft works, but something optional is missing
NEEDED = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "safetensors", "hydra-core", "pillow", "matplotlib", "jinja2")
EXTRAS = {
    "gradio": "the browser page (compare ui=true): pip install 'mmft[ui]'",
    "fastapi": "the OpenAI-compatible endpoint (mmft serve): pip install 'mmft[serve]'",
    "optuna": "searching sweeps: pip install 'mmft[sweep]'",
    "trl": "learning from rewards (objective=grpo): pip install 'mmft[rl]'",
    "hydra_plugins.hydra_submitit_launcher": "sweeps on a Slurm cluster: pip install 'mmft[slurm]'",
    "swanboard": "SwanLab's local dashboard: pip install 'swanlab[dashboard]'",
    "flash_attn": "model.attn_implementation=flash_attention_2: pip install flash-attn (sdpa is the default and needs nothing)",
}
OFF = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Finding:
    """The result of one check. state: OK, LESS or BROKEN. fix: what to do."""

    name: str
    state: str
    text: str
    fix: str = ""


def python() -> Finding:
    """The version of Python."""
    text = f"{platform.python_version()} on {platform.platform()}"
    return Finding("python", OK, text) if sys.version_info >= (3, 10) else Finding("python", BROKEN, text, "mmft needs Python 3.10 or newer")


def packages() -> Iterator[Finding]:
    """The needed packages, in the versions that mmft's metadata asks for."""
    from packaging.requirements import Requirement

    wanted = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # mmft runs from a checkout and is not installed
        wanted = {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("mmft") or ()) if not r.marker}
    versions, wrong = [], []
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        versions.append(f"{name} {version}")
        if name in wanted and not wanted[name].contains(version, prereleases=True):
            wrong.append(f"{name} {version} is not {wanted[name]}")
    yield Finding("packages", BROKEN, "; ".join(wrong), "pip install -U mmft") if wrong else Finding("packages", OK, ", ".join(versions[:4]))


def machine() -> Iterator[Finding]:
    """torch, the device of `model.device=auto`, its memory, bf16, and torchvision's compiled operators."""
    import psutil

    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        yield Finding("torch", BROKEN, one_line(error), "pip install --force-reinstall torch torchvision")
        return
    yield Finding("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")
    memory = psutil.virtual_memory()
    ram = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GB memory free"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            yield Finding("device", OK, f"cuda:{i} {torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GB free; {ram}")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("bf16", OK, "computed by this GPU") if bf16 else Finding("bf16", LESS, "not computed by this GPU; fp16 is used")
    elif torch.backends.mps.is_available():
        yield Finding("device", OK, f"mps, {ram}")
    else:
        built = "this torch is built without CUDA" if torch.version.cuda is None else f"torch is built for CUDA {torch.version.cuda} and sees no GPU"
        yield Finding("device", LESS, f"cpu ({os.cpu_count()} cores), {ram}; {built}", "enough for the built-in model; larger ones need a GPU and its driver")
        yield Finding("bf16", LESS, "not used on a CPU: fp32 is exact and faster there")
    try:
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        yield Finding("torchvision", OK, importlib.metadata.version("torchvision"))
    except Exception as error:
        yield Finding("torchvision", BROKEN, one_line(error), "install torch and torchvision together, from one index: pip install -U torch torchvision")


def quantising() -> Finding:
    """bitsandbytes: quantise a tensor to 4 bits and back on the device."""
    try:
        import torch

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            packed, state = quantize_4bit(torch.ones(64, 64, device="cuda" if torch.cuda.is_available() else "cpu"), quant_type="nf4")
            back = dequantize_4bit(packed, state)
        if not torch.allclose(back, torch.ones_like(back)):
            raise RuntimeError("4-bit weights come back changed")
        return Finding("bitsandbytes", OK, f"{importlib.metadata.version('bitsandbytes')}, nf4 works")
    except Exception as error:
        return Finding("bitsandbytes", LESS, one_line(error), "without it no 8-bit or 4-bit base: pip install -U bitsandbytes")


def hubs() -> list[tuple[str, str, str, str]]:
    """(name, address, environment variable for a mirror, environment variable for offline mode) of both hubs."""
    face = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scope = os.environ.get("MODELSCOPE_ENDPOINT") or f"https://{os.environ.get('MODELSCOPE_DOMAIN') or 'modelscope.cn'}"
    return [("huggingface", face, "HF_ENDPOINT", "HF_HUB_OFFLINE"), ("modelscope", scope, "MODELSCOPE_ENDPOINT", "MODELSCOPE_OFFLINE")]


def hub(name: str, address: str, mirror: str, offline: str, timeout: float) -> Finding:
    """Whether the hub answers within `timeout` seconds."""
    import urllib.error
    import urllib.request

    if os.environ.get(offline, "").upper() in OFF:
        return Finding(name, LESS, f"not asked: {offline} is set", "only local and cached models; unset it to download")
    shown = without_password(address)
    try:
        urllib.request.urlopen(urllib.request.Request(shown, method="HEAD", headers={"User-Agent": "mmft"}), timeout=timeout).close()
    except urllib.error.HTTPError:
        pass  # an answer, too
    except Exception as error:  # a wrong address, no route, no such host, a bad certificate, a timeout
        return Finding(name, LESS, f"{shown} does not answer: {one_line(getattr(error, 'reason', error))}",
                       f"a mirror: {mirror}=https://...; or download by hand and use model.path=FOLDER")  # fmt: skip
    return Finding(name, OK, f"{shown} answers")


def swanlab() -> Finding:
    """Whether runs with logger=swanlab are uploaded. No key is shown."""
    if importlib.util.find_spec("swanlab") is None:
        return Finding("swanlab", LESS, "not installed", "pip install swanlab, for logger=swanlab")
    try:
        from ..loggers.swanlab import SwanLab

        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            mode, why = SwanLab(mode="online").usable_mode()
    except Exception as error:
        return Finding("swanlab", LESS, f"does not start: {type(error).__name__}", "pip install -U swanlab")
    return Finding("swanlab", OK, "logged in") if mode == "online" else Finding("swanlab", LESS, "nobody is logged in: runs are logged offline", "swanlab login, or SWANLAB_API_KEY")


def disk(output_dir: str) -> Iterator[Finding]:
    """Free space and permission in output_dir, free space for downloads."""
    from ..runs.directory import MINIMUM_FREE
    from ..system.disk import existing_parent

    place = existing_parent(Path(output_dir).expanduser().resolve())
    free = shutil.disk_usage(place).free
    text = f"{free / 2**30:.1f} GB free for output_dir={output_dir}"
    if not os.access(place, os.W_OK):
        yield Finding("disk", BROKEN, f"output_dir={output_dir} cannot be written", "output_dir=... to write elsewhere")
    elif free < MINIMUM_FREE:
        yield Finding("disk", BROKEN, text, f"a run needs {MINIMUM_FREE >> 20} MB: free some, or output_dir=... elsewhere")
    else:
        yield Finding("disk", OK, text)
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    room = shutil.disk_usage(existing_parent(cache.expanduser().resolve())).free / 2**30
    yield Finding("downloads", OK, f"{room:.1f} GB free in {cache}") if room > 20 else Finding(
        "downloads", LESS, f"{room:.1f} GB free in {cache}", "a 7B model takes 15 GB; HF_HOME=... puts downloads elsewhere")  # fmt: skip


def extras() -> Iterator[Finding]:
    """Optional packages."""
    installed = []
    for module, use in EXTRAS.items():
        name = module.rpartition(".")[2]
        if has(module):
            installed.append(name)
        else:
            yield Finding("extra", LESS, f"{name} is not installed", use)
    if installed:
        yield Finding("extras", OK, ", ".join(installed))


def has(module: str) -> bool:
    """Whether a module is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def one_line(error: object) -> str:
    """A message on one line, at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def without_password(address: str) -> str:
    """An address without user:password@, which must not be shown."""
    head, at, tail = address.rpartition("@")
    return f"{head.split('//', 1)[0]}//{tail}" if at else address
