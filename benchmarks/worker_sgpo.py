"""Our side of the benchmarks: `worker_sgpo.py TASK.json RESULT.json`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workload
from common import timed

from sgpo_jax import environment, models, optim, rollout
from sgpo_jax.batch import Batch, Group, Prompts, pack_batch
from sgpo_jax.logprobs import token_kl
from sgpo_jax.losses import kl_divergence
from sgpo_jax.models import config as model_config
from sgpo_jax.models import huggingface
from sgpo_jax.train_step import init_state, make_update


def weights(task: dict[str, Any]) -> dict[str, Any]:
    """Random weights, which all sides load, in the Hugging Face folder `model`."""
    config = model_config.from_hf(workload.shape(task["shape"]).hf_config())
    huggingface.save(task["model"], models.init(jax.random.key(0), config), config)
    return {}


def generate(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of rollouts of `requests` responses, `group` to a prompt, `batch` at a time; and their tokens."""
    shape = workload.shape(task["shape"])
    params, config = load(task["model"])
    stops = workload.stop_ids(shape, task["median"])
    count = task["requests"] // task["group"]
    prompts = jnp.asarray(workload.prompts(shape, count, task["prompt"], len(stops), task["seed"]))

    def call(number):
        responses, steps = rollout.generate(
            params, config, prompts, jnp.ones_like(prompts, bool), jax.random.key(1000 * task["seed"] + number),
            jnp.arange(count), group=task["group"], max_new_tokens=task["longest"], temperature=1.0,
            top_p=task["top_p"], top_k=0, stop_ids=tuple(stops), pad_id=shape.vocab - 1, slots=task["batch"],
        )  # fmt: skip
        return np.asarray(responses.lengths), int(steps)

    results, measured = timed(call, task["calls"])
    lengths, steps = zip(*results, strict=True)
    return measured | {
        "tokens": [int(each.sum()) for each in lengths],
        "median_length": float(np.median(lengths)),
        "useful": [float(each.sum() / step) for each, step in zip(lengths, steps, strict=True)],
    }


def update(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of updates, AdamW included, on the same responses; the compiler's temporary memory in bytes."""
    shape = workload.shape(task["shape"])
    data = workload.responses(shape, task)
    config = model_config.from_hf(shape.hf_config())
    optimizer = optim.adamw(optim.schedule(1e-6, 1000), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0)

    def group(chosen):
        tokens = data.tokens[:, chosen]
        return Group(tokens, data.lengths[:, chosen], np.zeros(tokens.shape, np.float32), data.rewards[:, chosen])

    def prompts(tokens):
        return Prompts(tokens, np.ones(tokens.shape, bool))

    guided = task.get("guided", 0)
    strategies = workload.prompts(shape, task["problems"], task["strategy"], 0, 3) if guided else None
    batch = Batch(
        prompts(data.prompts),
        prompts(np.concatenate([strategies, data.prompts], axis=1)) if guided else None,
        group(slice(guided, None)),
        group(slice(guided)) if guided else None,
    )
    packed = pack_batch(batch, micro_batch=task["micro_batch"] or data.lengths.size)
    compiled_update = make_update(config, optimizer, remat=task["remat"])
    shapes = jax.eval_shape(lambda: init_state(models.init(jax.random.key(0), config), optimizer))
    started = time.perf_counter(), time.process_time()
    lowered = compiled_update.lower(shapes, packed)
    compiled = lowered.compile()
    result = {
        "compile_seconds": time.perf_counter() - started[0],
        "compile_cpu": time.process_time() - started[1],
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    if not task["calls"]:
        return result
    params, _ = load(task["model"])
    state = init_state(params, optimizer)
    del params

    def call(_):
        nonlocal state
        state, metrics = compiled(state, packed)
        return float(metrics["loss"])

    return timed(call, task["calls"])[1] | result


def kl(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the value and gradients of the mean token KL of N positions: in chunks, or all logits at once."""
    count, hidden, vocab = task["positions"], task["hidden"], task["vocab"]
    keys = jax.random.split(jax.random.key(0), 3)
    guided, unguided = (jax.random.normal(key, (count, hidden)) for key in keys[:2])
    head = jax.random.normal(keys[2], (hidden, vocab)) * hidden**-0.5

    def dense(guided, unguided, head):
        log_p = jax.nn.log_softmax(guided @ jax.lax.stop_gradient(head))
        return kl_divergence(jax.lax.stop_gradient(log_p), jax.nn.log_softmax(unguided @ head))

    by_token = dense if task["dense"] else token_kl
    mean = jax.jit(jax.value_and_grad(lambda *args: by_token(*args).mean(), argnums=(1, 2)))
    compiled = mean.lower(guided, unguided, head).compile()
    jax.block_until_ready((guided, unguided, head))
    before = resident()
    values, measured = timed(lambda _: float(jax.block_until_ready(compiled(guided, unguided, head))[0]), task["calls"])
    memory = compiled.memory_analysis().temp_size_in_bytes
    return measured | {"value": values[0], "temporary": memory, "resident_before": before}


def peak(task: dict[str, Any]) -> dict[str, Any]:
    """What the machine can do: float32 matrix products (FLOP/s) and copies in memory (bytes/s)."""
    size = 2048
    x = jax.random.normal(jax.random.key(0), (size, size))
    long = jnp.ones(2**27)
    product, add = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
    _, products = timed(lambda _: product(x, x).block_until_ready(), 10)
    _, copies = timed(lambda _: add(long).block_until_ready(), 5)
    return {
        "flops": [2 * size**3 / seconds for seconds in products["seconds"]],
        "bandwidth": [2 * long.nbytes / seconds for seconds in copies["seconds"]],
    }


def load(folder: str) -> tuple[Any, models.ModelConfig]:
    """Weights on the device, a leaf at a time, so that there are never two copies of all."""
    params, config = huggingface.load(folder)
    leaves, tree = jax.tree.flatten(params)
    del params
    for i in range(len(leaves)):
        leaves[i] = jnp.array(leaves[i])
    return jax.tree.unflatten(tree, leaves), config


def resident() -> int:
    """Bytes that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    work = {function.__name__: function for function in (weights, generate, update, kl, peak)}[task["work"]]
    Path(sys.argv[2]).write_text(json.dumps(work(task) | {"versions": environment.describe()}))
