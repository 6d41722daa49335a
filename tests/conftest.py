"""What the tests share: eight fake CPU devices, repeatable examples, and small decoders."""

import gc
import os
import time
from contextlib import contextmanager

from helpers import xla_flags

# Read when jax starts its backend, so it has to be set before any test touches a device.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + xla_flags.quick(8)
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's pool, by default one for each core. A device that waits for others in a collective holds one, and
# some collectives run at the same time: with too few threads all wait for ever.
os.environ["NPROC"] = "32"
# Of numpy's and torch's own threads. Those of several processes would spin on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

from sgpo_jax import models

# JAX makes very many objects that live for long, so a collection of all of them is rarely worth its time.
gc.set_threshold(100_000, 50, 1000)

# Files that take longest, from the longest on: they come first, so that no process is left alone with one at the end.
LONG = (
    "test_distributed", "test_kills", "test_bucket_runs", "test_run", "test_own_loop", "test_sharding", "test_methods",
    "test_parity", "test_adapters", "test_extraction", "test_train_step", "test_slots", "test_lab", "test_plan",
    "test_pages", "test_device_script", "test_verifier", "test_context", "test_logprobs", "test_drafts", "test_begun",
    "test_engine", "test_attention", "test_commands", "test_other_methods", "test_processes", "test_weights",
    "test_gpu_compiler", "test_carried", "test_evaluate",
)  # fmt: skip

# The same examples in every run; no deadline, because the first one of a test waits for the compiler.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """Keeps the order below where several processes share the files, which pytest-xdist would sort by their tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Begins with the files that take longest."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def tiny() -> models.ModelConfig:
    """A decoder with grouped heads and a head of its own; every size is divisible by a mesh of 2 x 2 x 2."""
    return models.ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=32,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=False,
        max_positions=256,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny):
    """Random parameters of `tiny`."""
    return models.init(jax.random.key(0), tiny)


@pytest.fixture(scope="session")
def at_most():
    """`with at_most(seconds):` of processor time, in which no garbage is collected: earlier tests left much of it."""

    @contextmanager
    def limit(seconds: float):
        gc.disable()
        started = time.process_time()
        try:
            yield
            taken = time.process_time() - started
        finally:
            gc.enable()
        assert taken < seconds

    return limit
