"""Parse the command line: verb, words and flags."""

from __future__ import annotations

import argparse
import os

from .. import __version__
from ..common.errors import UserError, nearest
from ..config.choices import JUDGE_VARIABLE
from ..config.command import Command
from ..config.groups import verbs
from ..config.guard.remote_code import TRUST_VARIABLE
from ..config.python_words import bare_keys
from ..config.ranking import renamed
from .completion import SCRIPTS
from .json_output import VERBS


def parse(argv: list[str]) -> Command:
    """The command of these arguments. Raises UserError for an unknown verb or flag."""
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
    parser.add_argument("--judge")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shell-completion", "-sc", choices=list(SCRIPTS))
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; `mmft --help` shows the usage") from None
    if unknown:
        flags = [f"--{a.replace('_', '-')}" for a in vars(args) if a != "words"]
        raise UserError(f"{unknown[0]}: no such flag.{nearest(unknown[0], flags)} Settings are written key=value, without dashes.")
    if args.trust_remote_code:
        os.environ[TRUST_VARIABLE] = "1"  # the processes of a sweep inherit it
    if args.judge:
        os.environ[JUDGE_VARIABLE] = args.judge
    command = Command(
        config_dir=args.config_dir, config_name=args.config_name.removesuffix(".yaml"), multirun=args.multirun, help=args.help, json=args.json, completion=args.shell_completion
    )
    words = list(args.words)
    if words and "=" not in words[0] and not words[0].startswith(("~", "+")):
        command.verb = words.pop(0)
        if command.verb not in verbs():
            raise UserError(f"{command.verb}: no such verb.{nearest(command.verb, verbs())} There are: {', '.join(verbs())}.")
        command.overrides.append(f"task={command.verb}")
    command.overrides = renamed([*command.overrides, *bare_keys(command.verb, words)], command.config_dir)
    if command.json and (command.multirun or command.verb not in VERBS):
        raise UserError(f"--json: goes with one command of {', '.join(VERBS[:-1])} or {VERBS[-1]}")
    for flag, value in (("--cfg", args.cfg), ("--package", args.package), ("--info", args.info)):
        command.hydra += [flag, value] if value else []
    for flag in ("resolve", "hydra_help"):
        command.hydra += [f"--{flag.replace('_', '-')}"] if getattr(args, flag) else []
    return command


def trains(command: Command) -> bool:
    """Whether the verb is train."""
    return all(w == "task=train" for w in command.overrides if w.startswith("task="))
