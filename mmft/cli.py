"""The command line: verbs, flags and help, all without importing torch."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import __version__
from .config import CONFIG_DIR, as_text, group_options, nearest, own_keys
from .errors import UserError
from .secrecy import redact
from .targets import TRUST_VARIABLE

# Hydra's own flags that mmft hands to Hydra unchanged.
HYDRA_FLAGS = ("--cfg", "--resolve", "--package", "--info", "--hydra-help", "--shell-completion")


@dataclass
class Command:
    """What was typed: overrides (with `task=VERB` for a verb) and flags."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_name: str = "config"
    multirun: bool = False
    help: bool = False
    hydra: list[str] = field(default_factory=list)  # Hydra's flags with their values, as typed
    verb: str | None = None


def verbs() -> dict[str, str]:
    """verb -> one line about it: the first comment of conf/task/VERB.yaml."""
    return {f.stem: first_comment(f) for f in sorted((CONFIG_DIR / "task").glob("*.yaml"))}


def bare_keys(verb: str | None, words: list[str]) -> list[str]:
    """A verb's own keys are typed bare (`mmft predict run=DIR input=FOLDER`) and lie in the config as task.KEY.

    Their values are paths and questions as people write them: `prompt=What is this, exactly?` needs no second quotes.
    """
    verb = verb or next((w.split("=", 1)[1] for w in words if w.startswith("task=")), "train")
    if verb not in verbs():
        return words
    own = own_keys(verb)
    return [f"task.{as_text(w)}" if w.split("=", 1)[0] in own else w for w in words]


def first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def parse(argv: list[str]) -> Command:
    """Errors raised: UserError for an unknown verb or flag."""
    parser = argparse.ArgumentParser(prog="mmft", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="version", version=f"mmft {__version__}")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn", default="config")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"])
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; `mmft --help` shows the usage") from None
    if unknown:
        flags = [f"--{a.replace('_', '-')}" for a in vars(args) if a != "words"]
        raise UserError(f"{unknown[0]}: no such flag.{nearest(unknown[0], flags)} Settings are written key=value, without dashes.")
    if args.trust_remote_code:
        os.environ[TRUST_VARIABLE] = "1"  # the processes of a sweep inherit it
    command = Command(
        config_dir=args.config_dir, config_name=args.config_name.removesuffix(".yaml"), multirun=args.multirun, help=args.help
    )
    words = list(args.words)
    if words and "=" not in words[0] and not words[0].startswith(("~", "+")):
        command.verb = words.pop(0)
        if command.verb not in verbs():
            raise UserError(f"{command.verb}: no such verb.{nearest(command.verb, verbs())} There are: {', '.join(verbs())}.")
        command.overrides.append(f"task={command.verb}")
    command.overrides += bare_keys(command.verb, words)
    for flag, value in (("--cfg", args.cfg), ("--package", args.package), ("--info", args.info)):
        command.hydra += [flag, value] if value else []
    for flag in ("resolve", "hydra_help", "shell_completion"):
        command.hydra += [f"--{flag.replace('_', '-')}"] if getattr(args, flag) else []
    return command


def trains(command: Command) -> bool:
    """Whether a command is the training of a model, and no other verb."""
    return all(w == "task=train" for w in command.overrides if w.startswith("task="))


HEAD = """\
mmft {version}: fine-tune vision-language models with LoRA, from composable configs.

usage: mmft [VERB] [group=option ...] [key=value ...] [flags]

verbs (without one: train)
{verbs}

groups and their options
{groups}

examples
  mmft                                          train the built-in tiny model on drawn shapes
  mmft model=qwen2vl data=coco500 lora.r=64     one run
  mmft -m lora.r=4,16,64 seed=1,2,3             one run for each point, then a leaderboard
  mmft experiment=blip2_football                a preset: model, data, lora and trainer at once
  mmft prepare data=coco data.path=DIR          look at a data set before training on it
  mmft --cfg job lora.r=64                      print the config a command resolves to

keys
  trainer.*      transformers.TrainingArguments      lora.*   peft.LoraConfig
  generation.*   transformers.GenerationConfig       model.quantization.*   BitsAndBytesConfig
  seed=42 name=WORD output_dir=outputs run_dir=DIR evaluation.max_samples=256 objective=eval_loss ...

flags
  --config-dir DIR   your own groups beside the shipped ones     --config-name NAME
  --cfg job          print the resolved config                   --multirun, -m
  --trust-remote-code   run the Python code that comes with a model (no file can say so)
  --help, --version, --info, --hydra-help, --shell-completion
"""


def help_text(command: Command) -> str:
    """The help of mmft, or of one verb: its yaml and what its keys are."""
    if command.verb:
        path = CONFIG_DIR / "task" / f"{command.verb}.yaml"
        lines = [f"mmft {command.verb}: {first_comment(path)}", "", f"usage: mmft {command.verb} [group=option ...] [key=value ...]", ""]
        keys = [line for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip() and "_target_" not in line]
        lines += ["its own keys", *(f"  {k}" for k in keys), ""] if keys else []
        return "\n".join([*lines, "All groups and keys: mmft --help"])
    options = group_options(command.config_dir)
    rows = [wrap(f"  {group:<11}", ", ".join(options[group])) for group in options if group != "task"]
    listed = "\n".join(wrap(f"  {verb:<11}", text) for verb, text in verbs().items())
    return HEAD.format(version=__version__, verbs=listed, groups="\n".join(rows))


def wrap(head: str, text: str, width: int = 80) -> str:
    import textwrap

    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def fail(error: UserError) -> int:
    """Print a user's mistake as one line; the process's exit code."""
    print(f"mmft: {redact(str(error))}", file=sys.stderr)
    return error.exit_code
