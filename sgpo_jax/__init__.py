"""Strategy-guided policy optimization (SGPO, arXiv 2606.24064) of language models in JAX."""

import os
import re
from importlib import metadata

__version__ = "0.1.0"

_JAX = (0, 10, 2)  # as in setup.py; an older one lacks names that are imported, and would fail with those

_found = metadata.version("jax")
if tuple(map(int, re.findall(r"\d+", _found)[:3])) < _JAX:
    # With this name Python answers `python -m sgpo_jax.main` in one line.
    raise ImportError(f"sgpo_jax needs jax {'.'.join(map(str, _JAX))} or newer; installed is {_found}", name=__name__)

# transformers would tell every user that torch is missing; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
