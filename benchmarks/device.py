"""Measures this package on the accelerator of this machine, in less than eight minutes.

    python benchmarks/device.py --json=device.json

Each part runs in a process of its own, with a limit of its own. Where one fails or runs too long, the others' figures
stay. Weights are random, and no network is needed. The parts:

* parity: attention, decoding and an update, compared with the CPU of this machine
* rollout, update: one RL step of a model, against the peaks of the card and the memory of the plan
* lora: the same update with adapters, and what it takes to merge them for a rollout
* quickstart: the quickstart with few steps
* generate, torch: Hugging Face generate and a torch update of the same model, where torch can use the card

docs/gpus.md says how to run it on a machine without a network.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import workload

from sgpo_jax.runtime import tables

GIB = 2**30
# Seconds of each part.
LIMITS = {"parity": 100, "rollout": 120, "update": 70, "lora": 70, "quickstart": 60, "generate": 35, "torch": 25}
MOST_ERROR = {"float32": 2e-4, "bfloat16": 3e-2}  # of the largest value; TF32 products would be about 1e-3
QUICK = (
    "sft.steps=40", "sft.validate_every=40", "rl.steps=4", "checkpoint.every=40", "eval.batch=64",
    "eval.sets.heldout.source=arithmetic:eval,count=64",
)  # fmt: skip


class NotHere(Exception):
    """A part cannot run on this machine; the message says why."""


def main() -> None:
    parser = common.arguments(
        "Parity, speed and memory on the accelerator of this machine.",
        shape=("qwen1p5b", workload.SHAPE_HELP), problems=(8, "problems of the RL step"),
        prompt=(1024, "tokens of a prompt"), longest=(4096, "tokens of a response"),
        micro_batch=(4, "rows of the update whose activations are in memory at once"),
        rank=(64, "of the adapters"), remat=("full", "what the update computes again in the backward pass"),
        minutes=(8.0, "limit of all parts together"), slack=(1.0, "factor on the limit of each part"),
        parts=(",".join(LIMITS), "which parts, separated by commas"),
        part=("", "the one part that this process runs; for the script itself"),
    )  # fmt: skip
    flags = parser.parse_args()
    if flags.part:
        _work(flags)
        return
    unknown = [part for part in flags.parts.split(",") if part not in LIMITS]
    if unknown:
        parser.error(f"--parts={flags.parts}: {unknown[0]} is none of {', '.join(LIMITS)}")
    deadline, results = time.monotonic() + 60 * flags.minutes, {}
    for part in flags.parts.split(","):
        results[part] = run_part(part, sys.argv[1:], min(LIMITS[part] * flags.slack, deadline - time.monotonic()))
        print(f"{part}: {results[part]['status']}, {results[part]['wall']:.0f} s", flush=True)
        for line in results[part].get("output", "").splitlines()[-4:]:
            print(f"    {line}", flush=True)
    compared = ratios(results)
    shown = results | {"ratios": compared}
    rows = [
        [part, name, f"{value:.4g}" if isinstance(value, float) else str(value)]
        for part, result in shown.items() for name, value in result.items() if name != "output"
    ]  # fmt: skip
    tables.table(f"{flags.shape}, {flags.prompt} + {flags.longest} tokens", ["part", "figure", "value"], rows)
    packages = common.versions("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "transformers")
    common.save(flags.json, __file__, flags=vars(flags), results=results, ratios=compared, versions=packages)


def run_part(part: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """Runs a part in a process of its own; returns its figures, its status and, if it failed, the end of its output."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result_file, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, __file__, *arguments, f"--part={part}", f"--json={result_file}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(common.ROOT), *sys.path])}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            process.wait(max(limit, 0))
            status = "" if process.returncode == 0 else f"failed: exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = f"stopped after {limit:.0f} s"
        result = json.loads(result_file.read_text()) if result_file.is_file() and not status else {"status": status}
        if status:
            result["output"] = log.read_text(errors="replace")[-3000:]
    return result | {"wall": time.monotonic() - started}


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the ratios of two parts, for those of which both were measured."""

    def ratio(above: tuple[str, str], below: tuple[str, str]) -> float | None:
        values = [results.get(part, {}).get(name) for part, name in (above, below)]
        return values[0] / values[1] if all(values) else None

    named = {
        "rollout over Hugging Face generate, tokens/s": ratio(("rollout", "tokens/s"), ("generate", "tokens/s")),
        "LoRA over full update, seconds": ratio(("lora", "seconds"), ("update", "seconds")),
        "LoRA over full update, peak memory": ratio(("lora", "peak GiB"), ("update", "peak GiB")),
        "merging over a rollout, seconds": ratio(("lora", "seconds to merge"), ("rollout", "seconds")),
    }
    return {name: value for name, value in named.items() if value is not None}


def _work(flags: Any) -> None:
    """Runs one part and writes its figures."""
    try:
        result = {"status": "done"} | PARTS[flags.part](flags)
    except NotHere as reason:
        result = {"status": f"not run: {reason}"}
    Path(flags.json).write_text(json.dumps(result))


def card() -> dict[str, Any]:
    """Returns the name of the first device, and the peaks of its kind where they are known."""
    import jax

    from sgpo_jax.plan import gpus

    device = jax.local_devices()[0]
    name, words = device.device_kind, device.device_kind.upper().replace("-", " ").split()
    kind = next((kind for kind in gpus.CHIPS if kind.upper() in words), "")
    kind += "-40gb" * (kind == "a100" and "40GB" in words)
    chip = None if "PCIE" in words else gpus.CHIPS.get(kind)  # the peaks are those of the SXM cards
    return {"device": name, "peak_flops": chip and chip.flops, "peak_hbm": chip and chip.hbm}


def parity(flags: Any) -> dict[str, Any]:
    """Compares attention with its gradients, decoding, and an update with the CPU."""
    import jax

    here, cpu = jax.local_devices()[0], jax.local_devices(backend="cpu")[0]
    figures: dict[str, Any] = {"device": here.device_kind}
    with ThreadPoolExecutor() as threads:  # programs compile side by side; their results are kept
        cases = [(here, dtype, size) for dtype in MOST_ERROR for size in (64, 128)]
        tasks = [threads.submit(_attention, *case) for case in cases]
        tasks += [threads.submit(_attention, cpu, "float32", size) for size in (64, 128)]
        tasks += [threads.submit(_small_update, device) for device in (here, cpu)]
        for task in tasks:
            task.result()
    for dtype in MOST_ERROR:
        for size in (64, 128):
            outputs = [_attention(device, kind, size) for device, kind in ((here, dtype), (cpu, "float32"))]
            names = ("out", "query", "key", "value")
            for name, ours, reference in zip(names, *outputs, strict=True):
                _compare(figures, f"attention {dtype}, heads of {size}, {name}", ours, reference, MOST_ERROR[dtype])
    ours, reference = _decoding(here, cpu)
    _compare(figures, "log-probabilities of decoding", ours, reference, MOST_ERROR["float32"])
    for name, ours, reference in zip(("loss", "grad_norm"), *(_small_update(d) for d in (here, cpu)), strict=True):
        _compare(figures, f"{name} of an update", ours, reference, MOST_ERROR["float32"])
    wrong = [name for name, value in figures.items() if str(value).startswith("WRONG")]
    return figures | {"status": f"WRONG: {len(wrong)} of {len(figures) - 1}" if wrong else "done"}


def _compare(figures: dict[str, Any], name: str, ours: Any, reference: Any, most: float) -> None:
    """Adds the largest difference, as a share of the largest value."""
    import numpy as np

    ours, reference = (np.asarray(x, np.float64) for x in (ours, reference))
    error = float(np.abs(ours - reference).max() / np.abs(reference).max())
    figures[name] = error if error <= most else f"WRONG: {error:.3g}, at most {most:g}"


@functools.cache
def _attention(device: Any, dtype: str, size: int) -> list[Any]:
    """Returns the outputs and the gradients of packed rows of an odd length."""
    import jax
    import jax.numpy as jnp

    from sgpo_jax import sharding
    from sgpo_jax.models import attention

    batch, length, heads, kv_heads = 2, 333, 4, 2
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weight = (
        jax.random.normal(k, (batch, length, n, size), jnp.bfloat16).astype(dtype)
        for k, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    segments = jnp.repeat(jnp.array([[1, 2, 0], [1, 1, 1]], jnp.int32), jnp.array([150, 150, 33]), axis=1)
    real = (segments != 0)[..., None, None]

    @jax.jit
    def out_and_gradients(*arrays):
        def out(query, key, value):
            return attention.attend(query, key, value, segments).reshape(weight.shape).astype(jnp.float32) * real

        outputs, backward = jax.vjp(out, *arrays)
        return outputs, *backward(weight.astype(jnp.float32))

    with jax.set_mesh(sharding.make_mesh(devices=[device])):
        return jax.device_get(out_and_gradients(*jax.device_put((query, key, value), device)))


def _small(device: Any) -> tuple[Any, Any, Any, Any]:
    """Returns (config, shape, mesh, assumptions) of a float32 model with two layers."""
    from sgpo_jax.models.config import from_hf

    shape = workload.Shape(layers=2, hidden=256, heads=4, kv_heads=2, mlp=512, vocab=512)
    return _run(from_hf(shape.hf_config()), device, 64, 160, 2, 4, "float32")


def _run(
    shape: Any, device: Any, prompt: int, response: int, problems: int, micro_batch: int, dtype: str
) -> tuple[Any, Any, Any, Any]:
    """Returns (config, shape, mesh, assumptions) of an RL step in which every prompt and response is the longest."""
    from sgpo_jax import config as configs
    from sgpo_jax import sharding
    from sgpo_jax.plan.workload import Assumed

    config = configs.paper("", tensor=1)
    config.stages = ("rl",)
    config.model.dtype = dtype
    config.data.max_prompt_tokens, config.rl.max_new_tokens = prompt, response
    config.rl.batch, config.rl.micro_batch = problems, micro_batch
    return config, shape, sharding.make_mesh(devices=[device]), Assumed(response, prompt)


def _program(name: str, config: Any, shape: Any, mesh: Any, assumed: Any) -> Any:
    from sgpo_jax.plan.programs import programs

    return next(program for program in programs(config, shape, mesh, assumed) if program.name == name)


def _params(config: Any, shape: Any, mesh: Any) -> Any:
    """Makes random parameters on the device."""
    import jax

    from sgpo_jax import models, sharding

    init = functools.partial(models.init, config=shape)
    shardings = sharding.tree_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(0))


def _sample(config: Any, shape: Any, mesh: Any, assumed: Any) -> tuple[Any, Callable, tuple]:
    """Returns (the compiled rollout, its function, its arguments)."""
    import jax
    import numpy as np

    program = _program("rollout", config, shape, mesh, assumed)
    *_, prompts, key, known = program.trace.args
    tokens = np.random.default_rng(0).integers(1, shape.vocab_size, prompts.tokens.shape, dtype=np.int32)
    problems = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), known)
    values = (
        type(prompts)(tokens, np.ones(tokens.shape, bool)), jax.random.split(jax.random.key(1), key.shape[0]),
        problems._replace(ids=np.arange(len(tokens), dtype=np.uint32)),
    )  # fmt: skip
    placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), values, (prompts, key, known))
    with jax.set_mesh(mesh):
        compiled = program.trace().lower().compile()
    return program, compiled, (_params(config, shape, mesh), *placed)


def _decoding(here: Any, cpu: Any) -> tuple[Any, Any]:
    """Returns the log-probabilities of sampled tokens: the sampler's here, and those of a forward pass on the CPU."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sgpo_jax import models

    config, shape, mesh, assumed = _small(here)
    config.rl.top_p = 1.0
    _, compiled, (params, prompts, *rest) = _sample(config, shape, mesh, assumed)
    with jax.set_mesh(mesh):
        rollout, _ = jax.device_get(compiled(params, prompts, *rest))
    per_prompt = np.array([config.rl.autonomous, config.rl.guided] * config.rl.batch)
    tokens = rollout.tokens.reshape(-1, rollout.tokens.shape[-1])
    rows = np.concatenate([np.repeat(np.asarray(prompts.tokens), per_prompt, axis=0), tokens], axis=1)

    def forward(params, rows, tokens):
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        hidden, _ = models.apply(params, shape, rows, positions, jnp.ones(rows.shape, jnp.int32))
        logits = hidden[:, assumed.prompt_tokens - 1 : -1] @ models.head(params, shape)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]

    with jax.set_mesh(_small(cpu)[2]):
        logp = jax.jit(forward)(*jax.device_put((jax.device_get(params), rows, tokens), cpu))
    real = np.arange(tokens.shape[1]) < rollout.lengths.reshape(-1, 1)
    return np.where(real, rollout.logp.reshape(tokens.shape), 0), np.where(real, np.asarray(logp), 0)


def _update(config: Any, shape: Any, mesh: Any, assumed: Any) -> tuple[Any, Callable, tuple]:
    """Returns (the program of the update, compiled, its arguments)."""
    import jax

    from sgpo_jax import logprobs
    from sgpo_jax.models import lora
    from sgpo_jax.models.lora import Lora
    from sgpo_jax.plan.programs import made_up_batch
    from sgpo_jax.policy import Policy
    from sgpo_jax.training import stage
    from sgpo_jax.training.batch import pack_batch
    from sgpo_jax.training.weighting import Weighting

    program = _program("update", config, shape, mesh, assumed)
    fields = config.rl
    packed = pack_batch(
        made_up_batch(config, assumed), Weighting.from_config(fields), fields.distillation,
        micro_batch=fields.micro_batch, chunk=logprobs.default_chunk(mesh),
    )  # fmt: skip
    batch = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), packed, program.trace.args[1])
    policy = Policy(shape, None, (0,), 0, config.model.dtype, "", lora=Lora.from_config(config.lora))
    tx, _ = stage.optimizer(config, "rl", 1)
    with jax.set_mesh(mesh):
        params, base = _params(config, shape, mesh), None
        if policy.lora:
            base = jax.tree.map(lambda x: x.astype(config.lora.base_dtype), params)
            params = lora.init(jax.random.key(1), shape, policy.lora)
        state = stage.first_state(params, policy, tx, mesh)
        return program, program.trace().lower().compile(), (state, batch, base)


@functools.cache
def _small_update(device: Any) -> list[Any]:
    """Returns the loss and the norm of the gradient of an update of the small model."""
    import jax

    config, shape, mesh, assumed = _small(device)
    with jax.default_device(device):
        _, compiled, arguments = _update(config, shape, mesh, assumed)
        with jax.set_mesh(mesh):
            _, metrics = compiled(*arguments)
    return [float(metrics[name]) for name in ("loss", "grad_norm")]


def quickstart(flags: Any) -> dict[str, Any]:
    """Runs the quickstart with few steps."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"--config.{change}" for change in QUICK]
        command = [sys.executable, "-m", "sgpo_jax.main", "--config=configs/quickstart.py", f"--workdir={folder}/run"]
        subprocess.run([*command, *changes], cwd=common.ROOT, check=True)
        rows = [json.loads(line) for line in Path(folder, "run", "rl.jsonl").read_text().splitlines()]
    return {"RL steps": len(rows), "reward of the last step": rows[-1]["reward_auto"]}


def _setup(flags: Any) -> tuple[Any, Any, Any, Any]:
    """Returns (config, shape, mesh, assumptions) of the RL step that the flags name, on the first device."""
    import jax

    from sgpo_jax.models.config import from_hf

    shape = from_hf(workload.shape(flags.shape).hf_config())
    sizes = flags.prompt, flags.longest, flags.problems, flags.micro_batch
    return _run(shape, jax.local_devices()[0], *sizes, "bfloat16")


def _memory(compiled: Any, resident: int) -> dict[str, Any]:
    """Returns GiB: what the plan says of a program, with what the run keeps beside it, and the peak of the device."""
    import jax

    from sgpo_jax.plan import estimate

    parts = estimate.memory(compiled.memory_analysis())
    planned = resident + sum(parts[name] for name in ("arguments", "outputs", "temporaries", "code"))
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"planned GiB": planned / GIB, "peak GiB": peak / GIB if peak else None}


def _share(amount: float, seconds: float, peak: float | None) -> float | None:
    return amount / seconds / peak if peak else None


def rollout(flags: Any) -> dict[str, Any]:
    """Samples the responses of an RL step; the second of two calls counts."""
    import jax
    import numpy as np

    from sgpo_jax.rollout.schedule import schedule

    config, shape, mesh, assumed = _setup(flags)
    _, compiled, arguments = _sample(config, shape, mesh, assumed)
    with jax.set_mesh(mesh):
        jax.block_until_ready(compiled(*arguments))
        started = time.perf_counter()
        responses, _ = jax.block_until_ready(compiled(*arguments))
        seconds = time.perf_counter() - started
    lengths = np.asarray(responses.lengths).reshape(1, -1)
    # What a decoding step has to read at least: the matrices in bfloat16, the embedding only where it is the head, and
    # the keys and values of all tokens so far.
    stages = schedule(lengths, np.full_like(lengths, flags.prompt), lengths.size).stages
    steps, cached = sum(stage.steps for stage in stages), sum(stage.steps * stage.cached for stage in stages)
    model = workload.shape(flags.shape)
    weights = 2 * (model.layer_parameters + model.head_parameters)
    token_bytes = 2 * 2 * model.layers * model.kv_heads * model.head_dim
    known = card()
    return {
        "device": known["device"], "responses": lengths.size, "seconds": seconds,
        "tokens/s": float(lengths.sum()) / seconds, "ms a step": 1000 * seconds / steps,
        "share of HBM peak": _share(steps * weights + cached * token_bytes, seconds, known["peak_hbm"]),
        **_memory(compiled, 0),  # the moments of the optimizer are not on the device here
    }  # fmt: skip


def update(flags: Any) -> dict[str, Any]:
    """Updates on the responses of an RL step; the second of two calls counts."""
    import jax

    from sgpo_jax.plan.flops import matmul_flops

    figures, (config, shape, mesh, assumed), _ = _timed_update(flags, 0)
    config.model.remat = "none"
    once = _program("update", config, shape, mesh, assumed)  # only traced: its products without those computed again
    with jax.set_mesh(mesh):
        flops = sum(matmul_flops(once.trace().jaxpr, once.scopes).values())
    return figures | {"MFU": _share(flops, figures["seconds"], card()["peak_flops"])}


def lora_update(flags: Any) -> dict[str, Any]:
    """Updates adapters on the same responses, and merges them into the base as before a rollout."""
    import jax

    from sgpo_jax.models import lora

    figures, (config, _, mesh, _), (adapters, base) = _timed_update(flags, flags.rank)
    with jax.set_mesh(mesh):
        for _ in range(2):
            started = time.perf_counter()
            jax.block_until_ready(lora.merge(base, adapters, lora.Lora.from_config(config.lora).scale))
    return figures | {"rank": flags.rank, "seconds to merge": time.perf_counter() - started}


def _timed_update(flags: Any, rank: int) -> tuple[dict[str, Any], tuple, tuple[Any, Any]]:
    """Returns the figures of the second of two updates, the setup, and (what is trained, its base)."""
    import jax

    config, shape, mesh, assumed = setup = _setup(flags)
    config.lora.rank, config.model.remat = rank, flags.remat
    program, compiled, (state, batch, base) = _update(config, shape, mesh, assumed)
    with jax.set_mesh(mesh):
        state, _ = jax.block_until_ready(compiled(state, batch, base))
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch, base))
        seconds = time.perf_counter() - started
    figures = {
        "device": card()["device"], "response tokens": program.tokens, "seconds": seconds,
        "tokens/s": program.tokens / seconds, "grad_norm": float(metrics["grad_norm"]), **_memory(compiled, 0),
    }  # fmt: skip
    return figures, setup, (state.params, base)


def _torch(flags: Any) -> tuple[Any, Any]:
    """Returns (torch, a model with the same shape in float32 on the card).

    Raises:
        NotHere: torch is missing, or cannot use the card that JAX uses.
    """
    import jax

    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise NotHere(f"{error}") from error
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise NotHere("this torch has no CUDA")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if gpu else "cpu")
    with device:
        return torch, LlamaForCausalLM(LlamaConfig(**workload.shape(flags.shape).hf_config()))


def _clock(torch: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def generate(flags: Any) -> dict[str, Any]:
    """Decodes a few tokens with Hugging Face `generate`, after contexts as long as those of a rollout on average."""
    torch, model = _torch(flags)
    model = model.to(torch.bfloat16).eval()
    rows, new = flags.problems * 12, min(64, flags.longest)
    context = torch.randint(1, model.config.vocab_size, (rows, flags.prompt + (flags.longest - new) // 2))
    context = context.to(model.device)
    seconds = {}
    for count in (1, new + 1):  # the first token is the prefill
        started = _clock(torch)
        with torch.inference_mode():
            model.generate(
                context, attention_mask=torch.ones_like(context), do_sample=True, max_new_tokens=count,
                min_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        seconds[count] = _clock(torch) - started
    return {"rows": rows, "context": context.shape[1], "tokens/s": rows * new / (seconds[new + 1] - seconds[1])}


def torch_update(flags: Any) -> dict[str, Any]:
    """Times the GRPO loss, its gradient and AdamW in torch: bfloat16 products, one row at once, layers recomputed."""
    torch, model = _torch(flags)
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=model.device.type == "cuda")
    rows = 2
    tokens = torch.randint(1, model.config.vocab_size, (rows, flags.prompt + flags.longest)).to(model.device)

    def step() -> float:
        started = _clock(torch)
        for row in tokens:
            with torch.autocast(model.device.type, torch.bfloat16):
                logits = model(row[None], logits_to_keep=flags.longest + 1).logits[0, :-1]
            logp = -torch.nn.functional.cross_entropy(logits.float(), row[-flags.longest :], reduction="none")
            (-(logp - logp.detach()).exp().mean() / rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _clock(torch) - started

    step()
    return {"rows": rows, "GRPO response tokens/s": rows * flags.longest / step()}


PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "parity": parity, "rollout": rollout, "update": update, "lora": lora_update, "quickstart": quickstart,
    "generate": generate, "torch": torch_update,
}  # fmt: skip

if __name__ == "__main__":
    main()
