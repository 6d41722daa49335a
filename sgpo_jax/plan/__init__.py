"""Plans a run for TPUs or GPUs that can be absent: its memory, work, communication, time and cost."""

from sgpo_jax.cli import lazily

_HOMES = {"make": "planner", "show": "report"}
__all__ = [*_HOMES]
__getattr__ = lazily(__name__, _HOMES)  # its command reads its flags before it imports all this
