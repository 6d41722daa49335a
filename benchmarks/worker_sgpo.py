"""Worker of the sgpo_jax side: `worker_sgpo.py TASK.json RESULT.json`."""

import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workload
from common import timed

from sgpo_jax import divergences, logprobs, models, rollout
from sgpo_jax.losses import kl_divergence
from sgpo_jax.models import config as model_config
from sgpo_jax.models import huggingface, lora
from sgpo_jax.runtime import environment, memory
from sgpo_jax.training.batch import Batch, Contexts, Group, pack_batch
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.optimizer import adamw, schedule
from sgpo_jax.training.state import init_state
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting


def weights(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the random weights that all sides load, as the Hugging Face folder `model`."""
    config = model_config.from_hf(workload.shape(task["shape"]).hf_config())
    huggingface.save(task["model"], models.init(jax.random.key(0), config), config)
    return {}


def generate(task: dict[str, Any]) -> dict[str, Any]:
    """Times rollouts of `requests` responses, `group` to a prompt, `batch` at a time; counts their tokens."""
    results, measured = timed(prepare_generate(task)[0], task["calls"])
    lengths, steps = zip(*results, strict=True)
    return measured | {
        "tokens": [int(call_lengths.sum()) for call_lengths in lengths],
        "median_length": float(np.median(lengths)),
        "useful": [float(call_lengths.sum() / step) for call_lengths, step in zip(lengths, steps, strict=True)],
    }


def groups(task: dict[str, Any]) -> dict[str, Any]:
    """Times rollouts of an `autonomous` and a `guided` group for each problem, `at_once` or one after the other."""
    shape = workload.shape(task["shape"])
    params, config = load(task["model"])
    stops, count = workload.stop_ids(shape, task["median"]), task["problems"]
    model = rollout.LanguageModel(config, tuple(stops), shape.vocab - 1)
    sampling = rollout.Sampling(task["longest"], slots=task["batch"])
    room = task["strategy"]
    guided = workload.prompts(shape, count, task["prompt"] + room, len(stops), task["seed"])
    real = np.broadcast_to(np.arange(guided.shape[1]) >= room, guided.shape)
    ids = np.arange(count)
    # One after the other, each group is padded to its own longest prompt; at once, both to the longest of all.
    inputs = [(guided[:, room:], real[:, room:], ids), (guided, np.ones_like(real), ids)]
    sizes: list[Any] = [task["autonomous"], task["guided"]]
    if task["at_once"]:
        pairs = [(guided, guided), (real, np.ones_like(real)), (ids, ids)]
        inputs = [tuple(np.stack(pair, axis=1).reshape(2 * count, *pair[0].shape[1:]) for pair in pairs)]
        sizes = [tuple(sizes)]

    def call(number):
        lengths, steps = [], 0
        for i, (size, (prompts, mask, problems)) in enumerate(zip(sizes, inputs, strict=True)):
            purpose = jax.random.fold_in(jax.random.key(1000 * task["seed"] + number), i)
            keys = jax.random.split(purpose, 2) if task["at_once"] else purpose
            responses, slot_steps = rollout.generate(
                params, model, rollout.Prompts(prompts, mask), keys, problems, sampling=sampling, group=size
            )
            lengths.append(np.asarray(responses.lengths).reshape(-1))
            steps += int(slot_steps)
        return np.concatenate(lengths), steps

    results, measured = timed(call, task["calls"])
    return measured | {
        "tokens": [int(lengths.sum()) for lengths, _ in results],
        "slot_steps": [steps for _, steps in results],
        "useful": [float(lengths.sum() / steps) for lengths, steps in results],
    }


def update(task: dict[str, Any]) -> dict[str, Any]:
    """Times updates, AdamW included, on the same responses; also the compiler's time and temporary memory in bytes."""
    started = time.perf_counter(), time.process_time()
    call, compiled = prepare_update(task)
    result = {
        "compile_seconds": time.perf_counter() - started[0],
        "compile_cpu": time.process_time() - started[1],
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    return result | timed(call, task["calls"])[1] if task["calls"] else result


def profile(task: dict[str, Any]) -> dict[str, Any]:
    """Profiles one call of the work `profiled`; "operations" has [name, seconds] of each operation."""
    call, compiled = {"generate": prepare_generate, "update": prepare_update}[task["profiled"]](task)
    call(0)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _, measured = timed(call, 1, warm_up=0)
        (file,) = Path(folder).glob("**/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        seconds: Counter[str] = Counter()
        for event in (event for plane in planes for line in plane.lines for event in line.events):
            operation = dict(event.stats).get("hlo_op")
            # The time of a loop is that of its operations, which are counted already.
            if operation and not operation.startswith(("while", "call", "conditional")):
                seconds[operation] += event.duration_ns / 1e9
    program = compiled.as_text()
    defined = dict(re.findall(r"^\s*(?:ROOT )?%(\S+) = (.*)$", program, re.MULTILINE))
    operations = []
    for name, spent in seconds.items():
        match = re.search(r'op_name="([^"]*)"', defined.get(name, ""))
        operations.append([match[1] if match else "", spent])
    return measured | {"operations": operations}


def prepare_generate(task: dict[str, Any]) -> tuple[Callable[[int], Any], Any]:
    """Returns a call, which returns lengths `[B,G]` and slot-steps, and the compiled program."""
    shape = workload.shape(task["shape"])
    params, config = load(task["model"])
    stops = workload.stop_ids(shape, task["median"])
    count = task["requests"] // task["group"]
    prompts = jnp.asarray(workload.prompts(shape, count, task["prompt"], len(stops), task["seed"]))
    mask, ids = jnp.ones_like(prompts, bool), jnp.arange(count)
    sampling = rollout.Sampling(task["longest"], 1.0, task["top_p"], slots=task["batch"], often=True)
    compiled = rollout.generate.lower(
        params, rollout.LanguageModel(config, tuple(stops), shape.vocab - 1), rollout.Prompts(prompts, mask),
        jax.random.key(0), ids, sampling=sampling, group=task["group"],
    ).compile()  # fmt: skip

    def call(number):
        key = jax.random.key(1000 * task["seed"] + number)
        responses, steps = compiled(params, rollout.Prompts(prompts, mask), key, ids)
        return np.asarray(responses.lengths), int(steps)

    return call, compiled


def prepare_update(task: dict[str, Any]) -> tuple[Callable[[int], Any], Any]:
    """Returns a call, which returns the loss, and the compiled program. The first call makes weights and moments."""
    shape = workload.shape(task["shape"])
    data = workload.responses(shape, task)
    config = model_config.from_hf(shape.hf_config())
    optimizer = adamw(schedule(1e-6, 1000), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0)
    micro_batch, share = task["micro_batch"] or data.lengths.size, task.get("share", 1)
    packed = pack_batch(batch(shape, data, task), Weighting(), micro_batch=max(micro_batch // share, 1), share=share)
    rank = task.get("rank", 0)

    def trained_and_base(params):
        """Returns the parameters and no base; or adapters and the parameters, which stay as they are, as their base."""
        if not rank:
            return params, None
        every_kernel = lora.Lora(rank, alpha=float(rank), targets=".*", rslora=False)
        return lora.init(jax.random.key(0), config, every_kernel), params

    def start(params):
        trained, base = trained_and_base(params)
        return init_state(trained, optimizer), base

    shapes, base = jax.eval_shape(lambda: start(models.init(jax.random.key(0), config)))
    update = make_update(Forward(config, remat=task["remat"]), optimizer, Objective())
    compiled = update.lower(shapes, packed, base).compile()
    state = None

    def call(_):
        nonlocal state, base
        if state is None:
            state, base = start(load(task["model"])[0])
        state, metrics = compiled(state, packed, base)
        return float(metrics["loss"])

    return call, compiled


def batch(shape: workload.Shape, data: workload.Responses, task: dict[str, Any]) -> Batch:
    """Returns a batch for GRPO; for SGPO where the task says how many samples of a group are `guided`."""
    guided = task.get("guided", 0)

    def group(samples):
        tokens = data.tokens[:, samples]
        return Group(tokens, data.lengths[:, samples], np.zeros(tokens.shape, np.float32), data.rewards[:, samples])

    def prompts(tokens):
        return Contexts(list(tokens), tokens.shape[1])

    if not guided:
        return Batch(prompts(data.prompts), None, group(slice(None)), None)
    strategies = workload.prompts(shape, task["problems"], task["strategy"], 0, 3)
    guided_prompts = prompts(np.concatenate([strategies, data.prompts], axis=1))
    return Batch(prompts(data.prompts), guided_prompts, group(slice(guided, None)), group(slice(guided)))


def kl(task: dict[str, Any]) -> dict[str, Any]:
    """Times the value and gradients of a mean divergence over N positions: in chunks, or with all logits at once."""
    count, hidden, vocab, chunk = task["positions"], task["hidden"], task["vocab"], task["chunk"]
    chosen = {"divergence": task["divergence"], "beta": 0.5, "k": task["k"]}
    selected = divergences.select(task["divergence"], chosen["beta"], chosen["k"])
    rng = np.random.default_rng(0)

    def normal(*shape):
        # The temporary arrays of jax.random would be the peak of the memory.
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    guided, unguided = normal(count, hidden) * hidden**-0.5, normal(count, hidden) * hidden**-0.5
    head = normal(hidden, vocab)

    def dense(guided, unguided, head):
        log_t = jax.lax.stop_gradient(jax.nn.log_softmax(guided @ head))
        return DENSE[task["divergence"]](log_t, jax.nn.log_softmax(unguided @ head), task["k"]).mean()

    def by_token(guided, unguided, head):
        return logprobs.token_divergence(guided, unguided, head, **chosen, chunk=chunk).mean()

    def summed(guided, unguided, head):
        """Returns the mean as the update computes it: the loss of a token depends on its own KL alone."""
        chunks = (x.reshape(-1, chunk, hidden) for x in (guided, unguided))
        weight = jnp.full((count // chunk, chunk), 1 / count)
        return logprobs.kl_loss(lambda kl, weight: weight * kl, *chunks, head, count // chunk, weight, selected)[0]

    mean = {"dense": dense, "token_kl": by_token, "kl_loss": summed}[task["how"]]
    compiled = jax.jit(jax.value_and_grad(mean, argnums=(1, 2))).lower(guided, unguided, head).compile()
    before = resident()
    values, measured = timed(lambda _: float(jax.block_until_ready(compiled(guided, unguided, head))[0]), task["calls"])
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return measured | {"value": values[0], "temporary": temporary, "resident_before": before}


def dense_jensen_shannon(log_t: jax.Array, log_s: jax.Array, k: int) -> jax.Array:
    """Returns the Jensen-Shannon divergence with beta = 1/2 in nats; `k` is not used."""
    log_m = jnp.logaddexp(log_t, log_s) - np.log(2)
    return (kl_divergence(log_s, log_m) + kl_divergence(log_t, log_m)) / 2


def dense_top_k_kl(log_t: jax.Array, log_s: jax.Array, k: int) -> jax.Array:
    """Returns SDPO's KL of the top k tokens and a tail, with its lower bound of the tail.

    Here the top tokens are the likeliest of the teacher T. In SDPO they are those of the student.
    """
    top_t, places = jax.lax.top_k(log_t, k)
    sides = top_t, jnp.take_along_axis(log_s, places, axis=-1)
    log_masses = (jnp.minimum(jax.nn.logsumexp(x, axis=-1, keepdims=True), -1e-7) for x in sides)
    tails = (jnp.log(-jnp.expm1(log_mass)) for log_mass in log_masses)
    return kl_divergence(*(jnp.concatenate(pair, axis=-1) for pair in zip(sides, tails, strict=True)))


# Divergences of whole arrays of log-probabilities, differentiated by JAX.
DENSE = {
    "forward_kl": lambda log_t, log_s, k: kl_divergence(log_t, log_s),
    "jensen_shannon": dense_jensen_shannon,
    "top_k_kl": dense_top_k_kl,
}


def peak(task: dict[str, Any]) -> dict[str, Any]:
    """Measures the speed of the machine: float32 matrix products (FLOP/s) and copies in memory (bytes/s)."""
    size = 2048
    x = jax.random.normal(jax.random.key(0), (size, size))
    long = jnp.ones(2**27)
    # The sum is in place: the kernel has to clear the pages of a new array first.
    product, add = jax.jit(jnp.dot), jax.jit(lambda x: x + 1, donate_argnums=0)

    def pass_over(_):
        nonlocal long
        long = add(long).block_until_ready()

    _, products = timed(lambda _: product(x, x).block_until_ready(), 10)
    _, copies = timed(pass_over, 5)
    return {
        "flops": [2 * size**3 / seconds for seconds in products["seconds"]],
        "bandwidth": [2 * long.nbytes / seconds for seconds in copies["seconds"]],
    }


def load(folder: str) -> tuple[Any, models.ModelConfig]:
    """Loads the weights on the device, a leaf at a time, so that there are never two copies of all."""
    params, config = huggingface.load(folder)
    leaves, tree = jax.tree.flatten(params)
    del params
    for i in range(len(leaves)):
        leaves[i] = jnp.array(leaves[i])
    return jax.tree.unflatten(tree, leaves), config


def resident() -> int:
    """Returns the resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    memory.trim_after_compiling()  # as the command does
    works = weights, generate, groups, update, kl, peak, profile
    work = {function.__name__: function for function in works}[task["work"]]
    Path(sys.argv[2]).write_text(json.dumps(work(task) | {"versions": environment.describe()}))
