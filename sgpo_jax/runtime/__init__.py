"""The machine under a run: processes that act as one, files that survive a kill, progress, signals."""

from sgpo_jax.runtime.distributed import is_first
from sgpo_jax.runtime.files import append_text, jsonl, read_jsonl, replacing, write_text
from sgpo_jax.runtime.progress import Progress
from sgpo_jax.runtime.tables import table

__all__ = ["Progress", "append_text", "is_first", "jsonl", "read_jsonl", "replacing", "table", "write_text"]
