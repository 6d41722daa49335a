"""Rollouts with the kernels of GPUs where there is no GPU."""

from functools import partial

from sgpo_jax.models import attention, attention_gpu
from sgpo_jax.rollout import engine, stages


def interpret(monkeypatch) -> None:
    """Makes rollouts choose as on GPUs, and runs the kernels of attention in interpret mode."""
    for module in (attention, engine, stages):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    for name in ("attend", "attend_cache"):
        monkeypatch.setattr(attention_gpu, name, partial(getattr(attention_gpu, name), interpret=True))
