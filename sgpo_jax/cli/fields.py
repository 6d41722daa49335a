"""The fields of the config with the comments that stand beside them in config.py, for the help of the commands."""

import functools
import re
from pathlib import Path

from sgpo_jax import config as configs

# config.rl.batch = 128  # problems per step
_FIELD = re.compile(r"    (config|model)\.([\w.]+) = (.*?)(?:  # (.*))?\n?")
_COMMENT = re.compile(r"    # (.*)\n?")
_MODELS = ("extract.strong.", "extract.judge.")  # sections that `_language_model` of config.py makes


@functools.cache
def comments() -> dict[str, str]:
    """Returns field or section -> its comments: those in the lines above it, then the one behind it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in Path(configs.__file__).read_text(encoding="utf-8").splitlines(keepends=True):
        if comment := _COMMENT.fullmatch(line):
            above.append(comment[1])
        elif field := _FIELD.fullmatch(line):
            text = " ".join([*above, *filter(None, [field[4]])])
            for prefix in _MODELS if field[1] == "model" else ("",):
                found.setdefault(prefix + field[2], text)
            above = []
        else:
            above = []
    return found
