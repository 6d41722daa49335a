"""The HTML page of a run or a lab, with its figures, example responses and reasoning steps."""

from sgpo_jax.cli import lazily

_HOMES = {"attempt": "page", "live": "page", "read_config": "page", "write_lab": "page", "write_run": "page"}
__all__ = [*_HOMES]
__getattr__ = lazily(__name__, _HOMES)  # its command reads its flags before it imports all this
