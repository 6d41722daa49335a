"""Plans a run for TPUs that can be absent: its memory, work, communication and time."""

from sgpo_jax.cli import lazily

_HOMES = {"make": "planner", "show": "report"}
__all__ = [*_HOMES]
__getattr__ = lazily(__name__, _HOMES)  # its command reads its flags before it imports all this
