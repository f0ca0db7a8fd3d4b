"""Run one command: parse the words, compose the config, call the verb, return the exit code."""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from ..common.errors import Preempted, UserError
from ..config import compose, overrides, sweep_overrides
from ..config.build import build
from ..config.command import Command
from ..config.guard.secrets import redact
from ..config.library_keys import CONFIG_DIR
from ..runs.directory import plain_name
from ..system import openmp
from ..system.console import set_up_logging
from . import help, parse


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: the run failed. 2: a mistake in the command, the config or the data. 75: stopped by a signal, after a checkpoint was
    saved. 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    openmp.begin()
    try:
        command = parse.parse(argv)
        if command.help:
            print(help.help_text(command))
            return 0
        if command.multirun and not command.hydra and parse.trains(command):
            from ..sweeps.launchers import sweep

            return report_failures(sweep(command))
        if command.hydra or command.multirun:
            return through_hydra(command)
        run(compose.compose(command.overrides, command.config_dir, command.config_name), command.overrides)
    except UserError as error:
        return fail(error)
    except Preempted as stop:
        print(f"mmft: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("mmft: interrupted", file=sys.stderr)
        return 130
    return 0


def run(cfg: DictConfig, words: list[str]) -> object:
    """Call the config's verb. `words` are the overrides that led to this config; verbs that create a run record them."""
    set_up_logging()
    return build(cfg.task)(cfg, [word.lstrip("+") for word in words])


def through_hydra(command: Command) -> int:
    """Let Hydra run multiruns of other verbs and Hydra's own flags; the words are checked here first."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    swept = sweep_overrides.check_sweep(command.overrides, command.config_dir, command.config_name)
    sys.argv = ["mmft", *command.hydra, *overrides.normalise(command.overrides)]
    if command.config_dir:
        sys.argv += ["--config-dir", command.config_dir]
    if command.multirun:
        sys.argv.append("--multirun")

    def job(cfg: DictConfig) -> object:
        compose.check(cfg)
        words = [word.lstrip("+") for word in HydraConfig.get().overrides.task]
        if cfg.run_dir is None:
            # named after what differs between the runs, in characters that can be typed back as run=...
            names = [plain_name(word.replace("=", "-")) for word in words if word.split("=", 1)[0] in swept]
            cfg.run_dir = f"{HydraConfig.get().sweep.dir}/{'_'.join(names) or 'run'}"
        try:
            return run(cfg, words)
        except UserError as error:  # the other points of a sweep go on
            failures.append(f"{cfg.run_dir}: {error}")
            fail(error)
            return None

    failures: list[str] = []
    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=command.config_name)(job)()
    return report_failures(failures)


def report_failures(failures: list[str]) -> int:
    """Print one line for each failed run; the exit code."""
    for failure in failures:
        print(f"mmft: failed: {redact(failure)}", file=sys.stderr)
    return 1 if failures else 0


def fail(error: UserError) -> int:
    """Print a user's mistake as one line; the exit code."""
    print(f"mmft: {redact(str(error))}", file=sys.stderr)
    return error.exit_code
