"""Parts that the commands share: flags, and errors as one line instead of a stack trace."""

import argparse
import logging as standard_logging
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sgpo_jax import config as configs
from sgpo_jax.runtime import distributed, environment
from sgpo_jax.runtime.preemption import Preempted


def start(run: Callable[..., None], required: Sequence[str]) -> None:
    """Runs `run(config, flags)` with the flags of the command line, or `run(flags)` if no config is required.

    Args:
      run: the command. The flags that it reads, except --config, must be defined before.
      required: names of the flags that the user must set.
    """
    has_config = "config" in required
    if has_config:
        config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    flags.mark_flags_as_required(required)

    def main(argv: list[str]) -> None:
        # JAX and Orbax log their steps, and log the errors that they raise a second time with a stack trace.
        logging.set_verbosity(logging.FATAL)
        standard_logging.getLogger("asyncio").disabled = True
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        try:
            with distributed.together():
                try:
                    run(*([flags.FLAGS.config] if has_config else []), flags.FLAGS)
                except Preempted as stopped:
                    print(f"sgpo_jax: {stopped}", flush=True)
        except (ValueError, ImportError, FloatingPointError, OSError) as error:
            sys.exit(f"sgpo_jax: {' '.join(str(error).split())}")

    app.run(main, flags_parser=parse_flags)


def define_processes() -> None:
    """Defines the flags of a command that several processes can run together."""
    flags.DEFINE_bool("distributed", False, "One process of several; TPU pod, SLURM, Open MPI or Kubernetes.")
    flags.DEFINE_string("coordinator", None, "One process of several, anywhere: HOST:PORT of the first.")
    flags.DEFINE_integer("processes", None, "With --coordinator: the number of processes.")
    flags.DEFINE_integer("process", None, "With --coordinator: the index of this one, from 0.")


def join(config: configs.ConfigDict, flag_values: flags.FlagValues) -> None:
    """Makes this process one of several if the flags ask for it.

    Raises:
      ValueError: the flags do not go together, the other processes do not connect, or they run with another config,
        other packages or another commit.
    """
    cluster = {name: getattr(flag_values, name) for name in ("coordinator", "processes", "process")}
    missing = [f"--{name}" for name, value in cluster.items() if value is None]
    if len(missing) == len(cluster):
        if not flag_values.distributed:
            return
        distributed.start()
    elif missing:
        raise ValueError(f"{', '.join(missing)}: missing; --coordinator, --processes and --process go together")
    else:
        _check_processes(**cluster)
        distributed.start(**cluster)
    fields = {f"config.{name}": value for name, value in configs.flat(configs.to_dict(config)).items()}
    # Hosts of one run may have different kernels.
    versions = {name: value for name, value in environment.describe().items() if name != "system"}
    distributed.agree(fields | versions)


def _check_processes(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"--coordinator={coordinator}: must be HOST:PORT, with a port from 1 to 65535")
    if processes < 1:
        raise ValueError(f"--processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise ValueError(f"--process={process}: must be from 0 to {processes - 1}, as --processes={processes}")


def folder(flag: str, value: str) -> Path:
    """Returns the folder that a flag names, after checking that it can be written to; it need not exist yet.

    Raises:
      ValueError: the folder cannot be created or written to.
    """
    path = Path(os.path.expanduser(value))
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise ValueError(f"--{flag}={value}: there is no such home folder")
    existing = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"--{flag}={value}: must be a folder that can be written to ({error})") from error
    return path


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags like absl, but explains a wrong config file, method or field in one line without a stack trace."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default="")
    file = early.parse_known_args(argv)[0].config
    if not file:
        return app.parse_flags_with_usage(argv)
    config = _load(file)
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):
        if unknown := configs.unknown_field(config, argv):
            sys.exit(f"sgpo_jax: {unknown}")
        raise


def _load(file: str) -> configs.ConfigDict:
    """Returns the config of `FILE` or `FILE:ARGUMENT`. An error in the file ends the process with its line and text."""
    path, *argument = file.split(":", 1)
    if not Path(path).is_file():
        sys.exit(f"sgpo_jax: --config={file}: there is no such file")
    try:
        return runpy.run_path(path)["get_config"](*argument)
    except ValueError as error:
        sys.exit(f"sgpo_jax: --config={file}: {error}")
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        sys.exit(f"sgpo_jax: --config={file}: {where}{type(error).__name__}: {error}")
