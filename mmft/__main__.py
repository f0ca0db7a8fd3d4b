"""`python -m mmft [VERB] key=value ...`: compose the config, build its task, call it."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from . import cli, config, expanding, patience
from .distributed import is_main
from .errors import Preempted, UserError
from .run import plain_name


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 a mistake in the command, the config or the data, 75 stopped by a signal and saved, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    patience.begin()
    try:
        command = cli.parse(argv)
        if command.help:
            print(cli.help_text(command))
            return 0
        if command.multirun and not command.hydra and cli.trains(command):
            from .launching import sweep

            return sweep(command)
        if command.hydra or command.multirun:
            return through_hydra(command)
        run(config.compose(command.overrides, command.config_dir, command.config_name), command.overrides)
    except UserError as error:
        return cli.fail(error)
    except Preempted as stop:
        print(f"mmft: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("mmft: interrupted", file=sys.stderr)
        return 130
    return 0


def run(cfg, overrides: list[str]) -> object:
    """Call the config's task; `overrides` are the words that led to this config, recorded by tasks that make a run."""
    quiet_libraries()
    return config.build(cfg.task)(cfg, [word.lstrip("+") for word in overrides])


def quiet_libraries() -> None:
    """mmft's own lines on stdout, plain; libraries speak up only with warnings."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: not getattr(record, "kept", False))  # of interest in the run's own log alone
    handler.set_name("stdout")
    log = logging.getLogger("mmft")
    log.handlers, log.propagate = [handler, *(h for h in log.handlers if h.get_name() != "stdout")], False  # the others are points' own
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    for library in ("transformers", "peft"):  # what they will rename one day is ours to follow, not the user's
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of missing optional kernels at every import
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer has been used


def through_hydra(command: cli.Command) -> int:
    """Sweeps and Hydra's own flags are Hydra's work; what it is given has been checked here first."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    swept = expanding.check_sweep(command.overrides, command.config_dir, command.config_name)
    sys.argv = ["mmft", *command.hydra, *config.normalise(command.overrides)]
    if command.config_dir:
        sys.argv += ["--config-dir", command.config_dir]
    if command.multirun:
        sys.argv.append("--multirun")

    def job(cfg) -> object:
        config.check(cfg)
        words = [word.lstrip("+") for word in HydraConfig.get().overrides.task]
        if cfg.run_dir is None:
            # named by what differs between the runs, in characters that can be typed back as run=...
            names = [plain_name(word.replace("=", "-")) for word in words if word.split("=", 1)[0] in swept]
            cfg.run_dir = f"{HydraConfig.get().sweep.dir}/{'_'.join(names) or 'run'}"
        try:
            return run(cfg, words)
        except UserError as error:  # the other points of a sweep go on
            failures.append(f"{cfg.run_dir}: {error}")
            cli.fail(error)
            return None

    failures: list[str] = []
    hydra.main(version_base="1.3", config_path=str(config.CONFIG_DIR), config_name=command.config_name)(job)()
    for failure in failures:
        print(f"mmft: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
