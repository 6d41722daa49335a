"""What the commands share: parsing their flags."""

import argparse
import sys
from pathlib import Path

from absl import app, flags

from sgpo_jax import config as configs


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; config_flags alone would answer a file or a field that does not exist with a stack trace."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default="")
    file = early.parse_known_args(argv)[0].config
    if file and not Path(file.split(":")[0]).is_file():
        sys.exit(f"sgpo_jax: --config={file}: there is no such file")
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):
        if unknown := configs.unknown_field(flags.FLAGS["config"].parser.parse(file), argv):
            sys.exit(f"sgpo_jax: {unknown}")
        raise
