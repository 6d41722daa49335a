"""The text of --help: usage, flags, examples, and the fields of the config with their comments."""

import shutil
import textwrap
from collections.abc import Sequence

from sgpo_jax import config as configs
from sgpo_jax.cli.command import Command, Flag
from sgpo_jax.cli.fields import comments

_INDENT = " " * 6
_WORDS = {str: "TEXT", int: "N", float: "X", bool: ""}


def help_text(name: str, command: Command, config: configs.ConfigDict | None, file: str = "") -> str:
    """Returns the help of a command, in the width of the terminal.

    Args:
      name: of the command.
      command: the command.
      config: the config whose values are shown; None where the command takes no config.
      file: the file that the config is from; "" is the paper's recipe.
    """
    width = max(40, min(shutil.get_terminal_size().columns, 110))
    lines = [*_wrapped(f"sgpo {name}: {command.summary}", "", width), "", *_wrapped(_usage(name, command), "", width)]
    lines += ["", "Flags"]
    if config is not None:
        lines += _item("--config=FILE[:ARGUMENT]", _config_help(command), width)
    for flag in command.all_flags:
        lines += _item(_form(flag), flag.help + _note(flag), width)
    lines += ["", "Examples", *(line for example in command.examples for line in _example(example, width))]
    if config is not None and command.fields:
        whose = f"in {file}" if file else "in the paper's recipe, config.base()"
        about = f"Fields of the config: --config.FIELD=VALUE changes one. The values here are those {whose}."
        lines += ["", *_wrapped(about, "", width), *_fields(config, command.fields, width)]
    return "\n".join(lines) + "\n"


def overview(commands: dict[str, Command], version: str) -> str:
    """Returns the help of the program: a line for every command."""
    width = max(40, min(shutil.get_terminal_size().columns, 110))
    title = f"sgpo_jax {version}: language models learn to reason from strategies (SGPO, arXiv 2606.24064)."
    lines = [*_wrapped(title, "", width), "", "usage: sgpo COMMAND [flags]; sgpo COMMAND --help shows them", ""]
    wide = max(map(len, commands))
    for name, command in commands.items():
        lines += textwrap.wrap(
            command.summary, width, initial_indent=f"  {name:{wide}}  ", subsequent_indent=" " * (wide + 4)
        )
    lines += ["", "Start:", "  sgpo train --config=configs/quickstart.py --workdir=/tmp/quickstart"]
    return "\n".join(lines) + "\n"


def _usage(name: str, command: Command) -> str:
    needed = [_form(flag) for flag in command.all_flags if flag.required]
    config = {"file": ["--config=FILE"], "run": ["[--config=FILE]"], "any": ["[--config=FILE]"], "": []}
    words = [f"{command.arguments.upper()} ..."] * bool(command.arguments)
    changes = ["[--config.FIELD=VALUE ...]"] * bool(command.config)
    return " ".join(["usage: sgpo", name, *config[command.config], *needed, "[flags]", *words, *changes])


def _config_help(command: Command) -> str:
    text = "A Python file whose get_config([ARGUMENT]) returns the config, such as those in configs/."
    if command.config in ("run", "any"):
        text += f" Without it: the config of the run that --{command.folder} names."
    return text + " Required." * (command.config == "file")


def _form(flag: Flag) -> str:
    value = "|".join(flag.choices) or _WORDS[flag.kind]
    return f"--{flag.name}" + f"={value}" * bool(value)


def _note(flag: Flag) -> str:
    if flag.required:
        return " Required."
    return f" Default: {flag.default}." if flag.default not in (None, "", False) else ""


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _example(text: str, width: int) -> list[str]:
    """Returns a command in lines that a shell reads as one."""
    parts = _wrapped(text, "", width - 8)
    return [("    " if i else "  ") + part + " \\" * (part is not parts[-1]) for i, part in enumerate(parts)]


def _item(title: str, text: str, width: int) -> list[str]:
    return [f"  {title}", *_wrapped(text, _INDENT, width)]


def _fields(config: configs.ConfigDict, prefixes: Sequence[str], width: int) -> list[str]:
    """Returns the lines of all fields that start with one of the prefixes, under their sections."""
    lines: list[str] = []
    shown = ""  # the section of the line before
    values = configs.flat(config.to_dict())
    place = {field: i for i, field in enumerate(comments())}  # as in config.py
    for field in sorted(values, key=lambda field: place.get(field, place.get(field.rpartition(".")[0], len(place)))):
        if not field.startswith(tuple(prefixes)):
            continue
        value = values[field]
        section = field.rpartition(".")[0]
        if section != shown:
            about = comments().get(section, "")
            lines += ["", *_wrapped(f"{section or 'top level'}{': ' * bool(about)}{about}", "  ", width)]
            shown = section
        setting = f"--config.{field}={value!r}"
        lines += textwrap.wrap(setting, width, initial_indent="    ", subsequent_indent=" " * 10)
        lines += [*_wrapped(comments().get(field, ""), " " * 8, width)]
    return lines
