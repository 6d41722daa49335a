"""The jitted programs of a run, to be traced with the shapes of their arguments. Nothing is computed on a device.

Rollouts with the assumed lengths are made up on the host, and the code of the training packs them. This gives the
shapes of the update and the trip counts of its loops.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sgpo_jax import logprobs, sharding
from sgpo_jax.models import (
    ModelConfig,
    attention,
    attention_gpu,
    attention_tpu,
    huggingface,
    lora,
    presets,
    windows,
)
from sgpo_jax.models.cache_codes import token_bytes
from sgpo_jax.models.lora import Lora
from sgpo_jax.plan import decoding, workload
from sgpo_jax.plan.phases import Scopes
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.policy import Policy, memory
from sgpo_jax.rollout import Begun, Problems, Prompts, Rollout, Sampling, drafts, generate, paging
from sgpo_jax.rollout.memory import cache_bytes, head_ways
from sgpo_jax.rollout.schedule import Pool
from sgpo_jax.runtime import buckets
from sgpo_jax.sharding import BATCH, HEADS, axis_ways, decoding_mesh, platform, row_ways
from sgpo_jax.training import carried, earlier, packing, rl, sft, stage, train_step
from sgpo_jax.training.batch import Batch, Contexts, Group, packer, specs
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.state import TrainState

ROLLOUT = "rollout"  # name of the program that samples the groups of a step


class Setting(NamedTuple):
    """A field of the config that trades the memory of a program for its time, and changes no result."""

    field: str  # such as "rl.slots"
    value: int  # rows or slots at once, over all devices
    bytes: int  # lower bound of the HBM of a device that grows with the value


class Program(NamedTuple):
    """A jitted program of the run."""

    name: str
    stage: str  # "sft", "rl" or "eval"
    mesh: Mesh  # on which it runs
    trace: Callable[[], Any]  # traces the program; call it, and compile its result, inside jax.set_mesh(mesh)
    scopes: Scopes
    resident: int  # bytes of a device's HBM that the run holds during a call, without the memory of the program
    arguments: int  # bytes of the arguments on a device
    calls: int  # in the whole run
    tokens: float  # response tokens of a call
    setting: Setting

    @property
    def least(self) -> int:
        """Lower bound of the bytes of HBM on a device, which is known before the program is compiled."""
        return self.resident + self.arguments + self.setting.bytes


class _Setup(NamedTuple):
    """The run that programs are made for."""

    config: ConfigDict
    policy: Policy
    mesh: Mesh
    assumed: Assumed
    calls: workload.Calls


def load_shape(config: ConfigDict) -> ModelConfig:
    """Returns the shape of the config's model. It needs no network, and no weights except those of a GGUF file.

    Raises:
        ValueError: the model is on the hub, and presets.py does not have its shape.
    """
    source = config.model.source
    if shape := presets.shape(source):
        return shape
    folder = Path(os.path.expanduser(source))
    if buckets.is_url(source) and not source.endswith(".gguf"):
        folder = buckets.fetch(source, lambda name: name == "config.json")
    if os.path.isdir(folder):
        return huggingface.read_config(folder)
    if source == "scratch" or source.endswith(".gguf"):
        return stage.load_policy(config)[0].config
    raise ValueError(
        f"config.model.source={source!r}: without a network the shapes of these are known: {', '.join(presets.KNOWN)}; "
        "also allowed: a local folder, a .gguf file, 'smollm2', 'scratch'"
    )


def programs(config: ConfigDict, shape: ModelConfig, mesh: Mesh, assumed: Assumed) -> list[Program]:
    """Returns every jitted program of the run's stages.

    Raises:
        ValueError: a parameter does not divide over the mesh.
    """
    policy = Policy(shape, None, (0,), 0, jnp.dtype(config.model.dtype), "", lora=Lora.from_config(config.lora))
    setup = _Setup(config, policy, mesh, assumed, workload.calls(config, assumed))
    sft_programs = _sft_programs(setup) if "sft" in config.stages else []
    rl_programs = _rl_programs(setup) if "rl" in config.stages else []
    state, base = _state(config, "rl", policy, mesh), _base(config, policy, mesh)
    params, resident = _whole(config, state, policy, base, training=bool(config.rl.eval_every))
    evaluations = [
        _generation(setup, "eval", f"evaluation, {samples} samples", params, resident, (samples,), count)
        for samples, count in sorted(setup.calls.evaluations.items())
    ]
    return [*sft_programs, *rl_programs, *evaluations]


def _sft_programs(setup: _Setup) -> list[Program]:
    config, policy, mesh, assumed, calls = setup
    fields, forward = config.sft, stage.make_forward(policy, config.model.remat)
    state, base = _state(config, "sft", policy, mesh), _base(config, policy, mesh)
    params, resident = _whole(config, state, policy, base)
    tx, _ = stage.optimizer(config, "sft", 1)
    update: Any = sft.make_update(forward, tx, shardings=_shardings(state))
    loss: Any = sft.make_losses(forward)

    longest = config.data.max_prompt_tokens, fields.max_response_tokens
    responses = workload.lengths(fields.batch, assumed.response_tokens, longest[1])
    encoded = {str(i): ([0] * assumed.prompt_tokens, [0] * int(n)) for i, n in enumerate(responses)}
    rows = [{"id": name} for name in encoded]
    encoded["longest"] = ([0] * longest[0], [0] * longest[1])  # decides the shapes, but is in no batch
    packed, tokens = sft.encode_batch(
        rows, encoded, batch=fields.batch, micro_batch=fields.micro_batch, chunk=logprobs.default_chunk(mesh),
        context=mesh.shape["context"],
    )  # fmt: skip
    packed_specs = packing.specs(packed)
    batch = _shapes_on(mesh, (packed, tokens), (packed_specs, packed_specs.owner))

    trips, branches = _trips({"responses": packed}), _branches(policy.config)
    scopes = Scopes("optimizer", (("responses", "responses"),), trips, branches=branches)
    setting = _layer_inputs("sft.micro_batch", packed, policy, mesh)
    total = float(responses.sum())
    return [
        Program(
            "SFT update", "sft", mesh, partial(update.trace, state, batch, base), scopes, resident=0,
            arguments=device_bytes((state, batch, base)), calls=calls.sft_steps, tokens=total, setting=setting,
        ),
        Program(
            "SFT validation", "sft", mesh, partial(loss.trace, params, batch), scopes, resident=resident,
            arguments=device_bytes((params, batch)), calls=calls.sft_validations, tokens=total,
            setting=setting._replace(bytes=0),
        ),
    ]  # fmt: skip


def _rl_programs(setup: _Setup) -> list[Program]:
    config, policy, mesh, assumed, calls = setup
    fields = config.rl
    state, base = _state(config, "rl", policy, mesh), _base(config, policy, mesh)
    params, resident = _whole(config, state, policy, base)
    generations = {ROLLOUT: (tuple(rl.sampled_groups(fields).values()), calls.rl_steps)}
    if calls.own_strategies:
        generations["own responses"] = (fields.self_tries,), calls.own_strategies
        generations["own strategies"] = (1,), calls.own_strategies
    samplers = [
        _generation(setup, "rl", name, params, resident, groups, count)
        for name, (groups, count) in generations.items()
    ]

    tx, _ = stage.optimizer(config, "rl", 1)
    forward = stage.make_forward(policy, config.model.remat)
    update: Any = train_step.make_update(
        forward, tx, Objective.from_config(fields), teaching=stage.teaching(config, "rl"), shardings=_shardings(state)
    )
    packed = packer(fields, mesh)(made_up_batch(config, assumed))
    batch = _shapes_on(mesh, packed, specs(packed))
    guided = None if packed.guided is None else packed.guided.packed
    parts = {"of_guided": guided}  # the first pattern that matches wins
    parts |= {"old_logp": packed.autonomous, "reference_logp": packed.autonomous, "candidates": packed.candidates}
    parts |= {"target_kl": packed.targets, "autonomous": packed.autonomous, "guided": guided}
    parts |= {"targets": packed.targets}
    phases = tuple((name, name) for name in parts)
    scopes = Scopes("optimizer", phases, _trips(parts), branches=_branches(policy.config))
    setting = _layer_inputs("rl.micro_batch", packed.autonomous, policy, mesh)
    tokens = float(packed.lengths.sum() + (0 if packed.guided_lengths is None else packed.guided_lengths.sum()))
    planned_update = Program(
        "update", "rl", mesh, partial(update.trace, state, batch, base), scopes, resident=0,
        arguments=device_bytes((state, batch, base)), calls=calls.rl_steps, tokens=tokens, setting=setting,
    )  # fmt: skip
    return [*samplers, planned_update]


def made_up_batch(config: ConfigDict, assumed: Assumed) -> Batch:
    """Makes up the rollouts of a step, with the assumed lengths and the assumed share of correct responses."""
    fields, random = config.rl, np.random.default_rng(0)
    longest = config.data.max_prompt_tokens
    prompts = Contexts([np.zeros(assumed.prompt_tokens, np.int32)] * fields.batch, longest)

    def group(size: int) -> Group:
        shape = fields.batch, size
        count = workload.lengths(
            fields.batch * size, assumed.response_tokens, fields.max_new_tokens, assumed.cut
        ).reshape(shape)
        rewards = (random.random(shape) < assumed.correct).astype(np.float32)
        tokens = np.zeros((*shape, fields.max_new_tokens), np.int32)
        return Group(tokens, count.astype(np.int32), np.zeros(tokens.shape, np.float32), rewards)

    guided = group(fields.guided) if fields.guided else None
    sampled = guided is not None and fields.guide != "demonstration"
    # The tokens differ from those of the unguided prompts; equal prompts would give nothing to distil.
    guided_prompts = Contexts([np.asarray(tokens) + 1 for tokens in prompts.tokens], longest) if sampled else None
    if fields.target == "own":
        hinted = [np.asarray(tokens) + 1 for tokens in prompts.tokens for _ in range(fields.autonomous)]
        guided_prompts = Contexts(hinted, longest)
        if fields.guide == "sibling":
            # The hint is a whole response, and the response that it is reads another one.
            length = assumed.prompt_tokens + round(assumed.response_tokens)
            hints = [np.full(length, 1 + (i == 0), np.int32) for i in range(fields.autonomous)]
            guided_prompts = Contexts(hints * fields.batch, rl.longest_sibling_prompt(longest, fields.max_new_tokens))
    return Batch(prompts, guided_prompts, group(fields.autonomous), guided)


def _generation(
    setup: _Setup, section: str, name: str, params: Any, resident: int, groups: tuple[int, ...], calls: int
) -> Program:
    """Samples groups of these sizes for each problem of a batch, as `generation.respond_in_groups` does.

    Args:
        setup: the run.
        section: of the config: "rl" or "eval".
        name: of the program.
        params: shapes of the parameters on the mesh.
        resident, groups, calls: bytes held during a call; responses of each group to a problem; calls in the whole run.
    """
    config, policy, mesh, assumed, _ = setup
    fields, longest, sampling = config[section], config.data.max_prompt_tokens, Sampling.from_config(config[section])
    beyond = carried.extra(fields) if name == ROLLOUT else 0
    shards, problems = row_ways(mesh), fields.batch + beyond
    prompt_count, count = problems * len(groups), problems * sum(groups)
    prompts = Prompts(*(_rows(mesh, kind, prompt_count, longest) for kind in (jnp.int32, jnp.bool)))
    # The problems of an evaluation may be those of several sets, and those in flight of several batches.
    keys = len(groups) if section == "rl" and not beyond else prompt_count
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), keys))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))
    known = Problems(_rows(mesh, jnp.uint32, prompt_count))
    if name == ROLLOUT:
        known = _known(mesh, known, sampling, problems, sum(groups), bool(beyond))
    trace = partial(
        generate.trace, params, policy.language_model, prompts, key, known, sampling=sampling, group=groups,
        shards=shards,
    )  # fmt: skip
    slots, length = min(fields.slots or count, count), longest - 1 + fields.max_new_tokens
    dtype = jnp.dtype(sampling.cache or policy.dtype)
    setting = Setting(f"{section}.slots", slots, cache_bytes(policy.config, slots, length, dtype, mesh))
    heads, pool = policy.config.num_kv_heads // head_ways(policy.config, mesh), None
    with jax.set_mesh(mesh):
        if sampling.pool:
            memory.least_pool(sampling, section, prompt_count // shards, longest, shards)
            size = paging.sizes(sampling, prompt_count // shards, longest, shards, policy.config.head_dim)
            of_prompts = prompt_count // shards * -(-(assumed.prompt_tokens - 1) // size.page)
            pool, length = Pool(size.page, size.total - of_prompts), size.most * size.page
            cache = size.total * cache_bytes(policy.config, shards, size.page, dtype, mesh)
            setting = Setting(f"{section}.pool_tokens", sampling.pool, cache)
        work = decoding.passes(fields, assumed, sum(groups), beyond, shards, slots // shards, pool)
        each = [1 + drafts.most_drafted(sampling.draft, stage.width, slots // shards) for stage in work.stages]
        cache_slots, width = attention.cache_shape(length, policy.config.head_dim)
        kernels = attention_gpu if platform() == "gpu" else attention_tpu
    page = pool.page if pool else 0
    at_once = [kernels.tokens_at_once(stage.width, heads, cache_slots, page) for stage in work.stages]
    reads = [kernels.reads(tokens) for tokens in each]
    scopes = decoding.scopes(work, reads, at_once, 2 * heads * token_bytes(width, dtype))
    scopes = scopes._replace(entries=(("layer_product", policy.config.num_layers),), branches=_branches(policy.config))
    return Program(
        name, section, decoding_mesh(mesh, sampling.decode_ways), trace, scopes, resident,
        arguments=device_bytes((params, prompts, known)), calls=calls,
        tokens=float(decoding.lengths(fields, assumed, fields.batch * sum(groups)).sum()), setting=setting,
    )  # fmt: skip


def _known(mesh: Mesh, known: Problems, sampling: Sampling, problems: int, each: int, begun: bool) -> Problems:
    """Adds what a step of RL knows of its problems, each with so many responses: see `rl.sample_groups`."""
    # Then the run keeps a store: see `rl.make_earlier`.
    if sampling.draft or sampling.pool or 0 < sampling.slots < problems * each:
        known = known._replace(expected=_rows(mesh, jnp.float32, known.ids.shape[0]))
    if sampling.draft:
        size = min(4 * sampling.max_new_tokens, earlier.MOST)
        known = known._replace(earlier=_rows(mesh, jnp.int32, problems, size))
    if not begun:
        return known
    tokens, logp = (_rows(mesh, kind, problems, each, sampling.max_new_tokens) for kind in (jnp.int32, jnp.float32))
    counts, due = _rows(mesh, jnp.int32, problems, each), _rows(mesh, jnp.bool, problems)
    enough = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return known._replace(begun=Begun(Rollout(tokens, logp, counts, counts), due, enough))


def _rows(mesh: Mesh, kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array whose rows the devices share."""
    return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, P(BATCH)))


def _branches(shape: ModelConfig) -> tuple[tuple[str, tuple[float, float]], ...]:
    """Returns the shares of the layers that do not slide and of those that do, where there are both."""
    share = sum(shape.sliding) / shape.num_layers
    return ((windows.EITHER, (1 - share, share)),)


def _layer_inputs(field: str, packed: Packed, policy: Policy, mesh: Mesh) -> Setting:
    """Returns the setting of an update. Its backward pass keeps at least the input of every layer."""
    _, rows, length = packed.contexts[0].tokens.shape
    shape = policy.config
    size = shape.num_layers * length * shape.hidden_size * policy.dtype.itemsize
    split = mesh.shape["tensor"] if length % axis_ways(mesh, HEADS) == 0 else 1
    return Setting(field, rows, rows * size // (row_ways(mesh) * split))


def _trips(parts: dict[str, Packed | None]) -> tuple[tuple[str, float], ...]:
    """Returns the trip counts of an update: micro-batches of each part, and the chunks of response tokens in them."""
    chunks, micro_batches = [], [("optimizer/while$", 1.0)]
    for name, packed in parts.items():
        if packed is not None:
            used = packed.chunks[: int(packed.count)]
            chunks.append((rf"{name}.*chunks\)*/while$", float(used.mean()) if len(used) else 0.0))
            micro_batches.append((f"{name}(/[a-z]+_logp)?/while$", float(packed.count)))
    return (*chunks, *micro_batches)


def _state(config: ConfigDict, name: str, policy: Policy, mesh: Mesh) -> TrainState:
    """Returns the training state of a stage as shapes on the mesh."""
    tx, _ = stage.optimizer(config, name, 1)
    shapes, shardings = stage.state_shardings(policy, tx, mesh, stage.teaching(config, name))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, state)


def _shapes_on(mesh: Mesh, tree: Any, tree_specs: Any) -> Any:
    """Returns the shapes of the arrays in a tree, with their shardings on the mesh."""
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=NamedSharding(mesh, spec)),
        tree, tree_specs,
    )  # fmt: skip


def device_bytes(tree: Any) -> int:
    """Returns the bytes that shapes on a mesh take on one device."""
    sizes = ((math.prod(x.sharding.shard_shape(x.shape)), x.dtype) for x in jax.tree.leaves(tree))
    return sum(-(-count * jax.dtypes.itemsize_bits(dtype) // 8) for count, dtype in sizes)


def _base(config: ConfigDict, policy: Policy, mesh: Mesh) -> Any:
    """Returns the frozen parameters under the adapters as shapes on the mesh; None without adapters."""
    if policy.lora is None:
        return None
    return _on_mesh(lora.base_shapes(policy.config, config.lora.base_dtype), mesh)


def _on_mesh(shapes: Any, mesh: Mesh) -> Any:
    shardings = sharding.tree_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _whole(config: ConfigDict, state: TrainState, policy: Policy, base: Any, training: bool = True) -> tuple[Any, int]:
    """Returns the whole model's parameters, as they are sampled from, and the bytes that a device holds beside them.

    These are the rest of the training state, if the run is `training`; and with adapters the kernels of the base that
    are merged into others. Its other parameters are shared.
    """
    if base is None or policy.lora is None:
        return state.params, training * (device_bytes(state) - device_bytes(state.params))
    embedding, base_dtype = base["embed"]["embedding"], config.lora.base_dtype
    params = _on_mesh(lora.base_shapes(policy.config, embedding.dtype.name), embedding.sharding.mesh)
    layers = [base["layers"][name] for name in lora.merged_kernels(policy.config, policy.lora, base_dtype)]
    kernels = [(leaves["kernel"], leaves.get("kernel_scale")) for leaves in layers]
    return params, training * device_bytes(state) + device_bytes(kernels)
