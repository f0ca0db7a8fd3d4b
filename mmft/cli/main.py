"""Run one command: parse the words, compose the config, call the verb, return the exit code."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig, OmegaConf

from ..api import call
from ..common.errors import Preempted, UserError
from ..config import compose, overrides, sweep_overrides
from ..config.command import Command
from ..config.guard.secrets import redact
from ..runs.directory import plain_name
from . import completion, help, json_output, parse


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: the run failed. 2: a mistake in the command, the config or the data. 75: stopped by a signal after a checkpoint was
    saved. 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    command: Command | None = None
    if completion.VARIABLE in os.environ:
        print("\n".join(completion.complete(os.environ[completion.VARIABLE])))
        return 0
    try:
        command = parse.parse(argv)
        if command.completion is not None:
            print(completion.SCRIPTS[command.completion], end="")
            return 0
        if command.help:
            print(help.help_text(command))
            return 0
        if command.multirun and not command.hydra and parse.trains(command):
            from ..sweeps.launchers import launch_sweep

            return report_failures(launch_sweep(command))
        if command.multirun or command.hydra and command.hydra[:2] != ["--cfg", "job"]:
            return through_hydra(command)
        cfg = compose.compose(command.overrides, command.config_dir, command.config_name)
        if command.hydra:
            print_config(cfg, command.hydra)
            return 0
        if command.json:
            with json_output.lines_on_stderr():
                result = call(cfg, command.overrides)
            json_output.print_result(result)
        else:
            call(cfg, command.overrides)
    except UserError as error:
        if command is not None and command.json and error.result is not None:
            json_output.print_result(error.result)
        return fail(error)
    except Preempted as stop:
        print(f"mmft: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("mmft: interrupted", file=sys.stderr)
        return 130
    return 0


def print_config(cfg: DictConfig, flags: list[str]) -> None:
    """`--cfg job`: the config as yaml, or with `--package KEY` a part of it; `--resolve` resolves interpolations. Raises UserError."""
    package = flags[flags.index("--package") + 1] if "--package" in flags else "_global_"
    node = cfg if package == "_global_" else OmegaConf.select(cfg, package)
    if node is None:
        raise UserError(f"--package {package}: no such key in the config")
    print(OmegaConf.to_yaml(node, resolve="--resolve" in flags) if OmegaConf.is_config(node) else node, end="\n" if not OmegaConf.is_config(node) else "")


def through_hydra(command: Command) -> int:
    """Let Hydra handle its own flags and multiruns of verbs other than train; the words are checked here first."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    swept, first = sweep_overrides.check_sweep(command.overrides, command.config_dir, command.config_name)
    main_dir, words = compose.search_path(command.overrides, command.config_dir, command.config_name)
    sys.argv = ["mmft", *command.hydra, *overrides.hydra_words(words, first, several=command.multirun)]
    if command.multirun:
        sys.argv.append("--multirun")

    def job(cfg: DictConfig) -> object:
        compose.finish(cfg)
        words = [word.lstrip("+") for word in HydraConfig.get().overrides.task]
        if cfg.run_dir is None:
            # named after what differs between the runs, in characters that can be typed as run=...
            names = [plain_name(word.replace("=", "-")) for word in words if word.split("=", 1)[0] in swept]
            cfg.run_dir = f"{HydraConfig.get().sweep.dir}/{'_'.join(names) or 'run'}"
        try:
            return call(cfg, words)
        except UserError as error:  # the other points of a sweep go on
            failures.append(f"{cfg.run_dir}: {error}")
            fail(error)
            return None

    failures: list[str] = []
    hydra.main(version_base="1.3", config_path=main_dir, config_name=command.config_name)(job)()
    return report_failures(failures)


def report_failures(failures: list[str]) -> int:
    """Print one line for each failed run; the exit code."""
    for failure in failures:
        print(f"mmft: failed: {redact(failure)}", file=sys.stderr)
    return 1 if failures else 0


def fail(error: UserError) -> int:
    """Print an error as one line; the exit code."""
    print(f"mmft: {redact(str(error))}", file=sys.stderr)
    return error.exit_code
