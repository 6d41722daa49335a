"""The front of every command: flags, help, config, start line, and errors as one line; imports no JAX."""

from sgpo_jax.cli.command import Command, Flag
from sgpo_jax.cli.entry import start
from sgpo_jax.cli.folders import existing_file, existing_folder, file, folder, new_folder
from sgpo_jax.cli.lazy import lazily
from sgpo_jax.cli.table import COMMANDS, main

__all__ = [
    "COMMANDS", "Command", "Flag", "existing_file", "existing_folder", "file", "folder", "lazily", "main", "new_folder",
    "start",
]  # fmt: skip
