"""The help text of mmft and of each verb."""

from __future__ import annotations

import textwrap

from .. import __version__
from ..config.command import Command
from ..config.comments import MODELINE
from ..config.groups import CONFIG_DIR, first_comment, group_options, verbs

HEAD = """\
mmft {version}: fine-tune vision-language models with LoRA, from composable configs.

usage: mmft [VERB] [group=option ...] [key=value ...] [flags]

verbs (without one: train)
{verbs}

groups and their options
{groups}

examples
  mmft                                       train the built-in tiny model
  mmft model=qwen2vl data=coco500 lora.r=64  one run
  mmft -m lora.r=4,16,64 seed=1,2,3          each point, and a leaderboard
  mmft experiment=blip2_football             a preset of all groups
  mmft prepare data=coco data.path=DIR       check a data set before training
  mmft --cfg job lora.r=64                   print the resolved config

keys
  trainer.*              transformers.TrainingArguments
  lora.*                 peft.LoraConfig
  generation.*           transformers.GenerationConfig
  model.quantization.*   transformers.BitsAndBytesConfig
  seed=42 name=WORD output_dir=outputs run_dir=DIR rank_by=eval_loss ...

flags
  --config-dir DIR         your own groups beside the shipped ones
  --config-name NAME       another main config, such as a run's snapshot
  --cfg job                print the resolved config
  --multirun, -m           a run for each combination of values
  --judge URL              the host of metrics=[judge] (no file can name it)
  --trust-remote-code      run Python code that comes with a model (no file can)
  --json                   of audit, doctor, evaluate and runs: JSON on stdout,
                           lines for people on stderr
  --shell-completion bash  print the script that completes commands (or zsh)
  --help, --version, --info, --hydra-help
"""


def help_text(command: Command) -> str:
    """The help of mmft, or of one verb with its keys."""
    if command.verb:
        path = CONFIG_DIR / "task" / f"{command.verb}.yaml"
        lines = [f"mmft {command.verb}: {first_comment(path)}", "", f"usage: mmft {command.verb} [group=option ...] [key=value ...]", ""]
        keys = [line for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip() and "_target_" not in line and not line.startswith(MODELINE)]
        lines += ["its own keys", *(f"  {k}" for k in keys), ""] if keys else []
        return "\n".join([*lines, "All groups and keys: mmft --help"])
    options = group_options(command.config_dir)
    rows = [wrap(f"  {group:<11}", ", ".join(options[group])) for group in options if group != "task"]
    listed = "\n".join(wrap(f"  {verb:<11}", text) for verb, text in verbs().items())
    return HEAD.format(version=__version__, verbs=listed, groups="\n".join(rows))


def wrap(head: str, text: str, width: int = 80) -> str:
    """`head` and `text`, wrapped and indented below the text."""
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
