"""`python -m mmft [VERB] key=value ...`: compose the config, build its task, call it."""

from __future__ import annotations

import logging
import os
import sys

from . import cli, config
from .errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 a mistake in the command, the config or the data, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = cli.parse(argv)
        if command.help:
            print(cli.help_text(command))
            return 0
        if command.hydra or command.multirun:
            return through_hydra(command)
        run(config.compose(command.overrides, command.config_dir, command.config_name))
    except UserError as error:
        return cli.fail(error)
    except KeyboardInterrupt:
        print("mmft: interrupted", file=sys.stderr)
        return 130
    return 0


def run(cfg) -> object:
    quiet_libraries()
    return config.build(cfg.task)(cfg)


def quiet_libraries() -> None:
    """mmft's own lines on stdout, plain; libraries speak up only with warnings."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("mmft")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of missing optional kernels at every import
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer has been used


def through_hydra(command: cli.Command) -> int:
    """Sweeps and Hydra's own flags are Hydra's work; what it is given has been checked here first."""
    import hydra

    overrides = config.normalise(command.overrides)
    config.check_sweep(command.overrides, command.config_dir, command.config_name)
    sys.argv = ["mmft", *command.hydra, *overrides]
    if command.config_dir:
        sys.argv += ["--config-dir", command.config_dir]
    if command.multirun:
        sys.argv.append("--multirun")

    def job(cfg) -> object:
        config.check(cfg)
        return run(cfg)

    hydra.main(version_base="1.3", config_path=str(config.CONFIG_DIR), config_name=command.config_name)(job)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
