"""Reads the command line: the config that it names or implies, its changes, and the command's own flags."""

import argparse
import os
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import config_flags

from sgpo_jax import config as configs
from sgpo_jax.cli.command import Command
from sgpo_jax.cli.folders import existing_folder

_DEFINE: dict[type, Callable[..., Any]] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
}


def parse(command: Command, arguments: Sequence[str]) -> tuple[configs.ConfigDict | None, SimpleNamespace]:
    """Returns (the config with its changes, or None; the values of the flags) of a command line.

    Raises:
      ValueError: a flag, a field, a value or a file is wrong or missing; the message names it.
    """
    config = None
    if command.config:
        file, arguments = named_file(arguments)
        config = load(file) if file else _implied(command, arguments)
        _add_sets(config, arguments)
    values = _defined(command)
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["sgpo", *arguments])
        words = values(["sgpo", *arguments])[1:]
    except (AttributeError, KeyError):
        if config is not None and (unknown := configs.unknown_field(config, arguments)):
            raise ValueError(unknown) from None
        raise
    except (flags.Error, TypeError) as error:
        raise ValueError(f"{error} (--help shows all)" if "Unknown" in str(error) else str(error)) from None
    if words and not command.arguments:
        raise ValueError(f"{words[0]}: is not a flag; values follow '=', and texts with spaces stand in quotes")
    for flag in command.all_flags:
        if flag.required and values[flag.name].value is None:
            raise ValueError(f"--{flag.name}: must be given. {flag.help}")
    given = {flag.name: values[flag.name].value for flag in command.all_flags}
    return config, SimpleNamespace(**given | ({command.arguments: words} if command.arguments else {}))


def named_file(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Returns (the value of --config, the other arguments)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    known, others = parser.parse_known_args(arguments)
    return known.config, others


def load(file: str) -> configs.ConfigDict:
    """Returns the config of `FILE` or `FILE:ARGUMENT`.

    Raises:
      ValueError: there is no such file, or an error in it; the message has its line and text.
    """
    path, *argument = file.split(":", 1)
    if not Path(path).is_file():
        raise ValueError(f"--config={file}: there is no such file")
    try:
        config = runpy.run_path(path)["get_config"](*argument)
    except ValueError as error:
        raise ValueError(f"--config={file}: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        raise ValueError(f"--config={file}: {where}{type(error).__name__}: {error}") from error
    if not isinstance(config, configs.ConfigDict):
        raise ValueError(f"--config={file}: get_config returns a {type(config).__name__}; must be a ConfigDict")
    return config.lock()


def _implied(command: Command, arguments: Sequence[str]) -> configs.ConfigDict:
    """Returns the config of the run that the flags name, or the paper's recipe where the command can do with it."""
    if command.config in ("run", "any"):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(f"--{command.folder}", dest="folder", default="")
        if name := parser.parse_known_args(arguments)[0].folder:
            if "://" in name:
                folder = existing_folder(command.folder, re.sub(r":(best|last|\d+)$", "", name))
            else:
                folder = Path(os.path.expanduser(name))
                folder = folder if folder.is_dir() else Path(os.path.expanduser(name.rpartition(":")[0] or name))
            if (folder / "config.json").is_file():
                return configs.from_json(folder / "config.json")
            raise ValueError(f"--{command.folder}={name}: there is no config.json of a run in it; give --config=FILE")
        if command.config == "any":
            return configs.base()
        raise ValueError(f"--{command.folder}: must name the folder of a run, or --config=FILE a config")
    raise ValueError("--config: must be given: a file such as configs/quickstart.py")


def _add_sets(config: configs.ConfigDict, arguments: Sequence[str]) -> None:
    """Adds the evaluation sets that only the command line has: --config.eval.sets.NAME.source=SOURCE."""
    for argument in arguments:
        path = argument.lstrip("-").partition("=")[0].split(".")
        if path[:3] == ["config", "eval", "sets"] and len(path) == 5 and path[4] in ("source", "samples"):
            if path[3] not in config.eval.sets:
                with config.unlocked():
                    config.eval.sets[path[3]] = configs.ConfigDict({"source": "", "samples": 1})


def _defined(command: Command) -> flags.FlagValues:
    """Returns absl's flags of a command, not parsed yet."""
    values = flags.FlagValues()
    for flag in command.all_flags:
        if flag.choices:
            flags.DEFINE_enum(flag.name, flag.default, flag.choices, flag.help, flag_values=values)
        elif flag.kind is bool:
            flags.DEFINE_bool(flag.name, flag.default, flag.help, flag_values=values)
        elif flag.kind is str:
            flags.DEFINE_string(flag.name, flag.default, flag.help, flag_values=values)
        else:
            define = _DEFINE[flag.kind]
            define(flag.name, flag.default, flag.help, flag.low, flag.high, flag_values=values)
    return values
