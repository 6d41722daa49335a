"""The jitted programs of a run, traced with the shapes they are called with; nothing is computed on a device.

A step's rollouts are made up on the host with the assumed lengths, and the run's own code packs them. That gives the
shapes of the update and how often its loops run.
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

from sgpo_jax import logprobs
from sgpo_jax.models import ModelConfig, attention, huggingface, init_cache, presets
from sgpo_jax.plan import workload
from sgpo_jax.plan.phases import Scopes
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.policy import Policy
from sgpo_jax.policy.generation import Prompts
from sgpo_jax.rollout import generate
from sgpo_jax.rollout.schedule import Stage, schedule
from sgpo_jax.sharding import BATCH, row_ways
from sgpo_jax.training import packing, rl, sft, stage, train_step
from sgpo_jax.training.batch import Batch, Group, pack_batch, specs
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.state import TrainState


class Setting(NamedTuple):
    """A field of the config that trades the memory of a program for its time, and changes no result."""

    field: str  # as in "rl.slots"
    value: int  # rows or slots at once, over all devices
    bytes: int  # of a device's HBM that grow with the value; no more than a lower bound


class Program(NamedTuple):
    """A jitted program of the run."""

    name: str
    stage: str  # "sft", "rl" or "eval"
    trace: Callable[[], Any]  # to be called, and what it gives to be compiled, inside jax.set_mesh
    scopes: Scopes
    resident: int  # bytes of a device's HBM that the run holds meanwhile, beside what the program itself needs
    arguments: int  # bytes of them on a device
    calls: int  # in the whole run
    tokens: float  # response tokens of a call
    setting: Setting

    @property
    def least(self) -> int:
        """Bytes of HBM that a device needs at least, before anything is compiled."""
        return self.resident + self.arguments + self.setting.bytes


def load_shape(config: ConfigDict) -> ModelConfig:
    """The shape of the config's model, without a network and without its weights, but for those of a GGUF file.

    Raises:
      ValueError: it is a model of the hub whose shape is not known here.
    """
    source = config.model.source
    if shape := presets.shape(source):
        return shape
    folder = Path(os.path.expanduser(source))
    if os.path.isdir(folder):
        return huggingface.read_config(folder)
    if source == "scratch" or source.endswith(".gguf"):
        return stage.load_policy(config)[0].config
    raise ValueError(
        f"config.model.source={source!r}: without a network the shapes of these are known: {', '.join(presets.KNOWN)}; "
        "also allowed: a local folder, a .gguf file, 'smollm2', 'scratch'"
    )


def programs(config: ConfigDict, shape: ModelConfig, mesh: Mesh, assumed: Assumed) -> list[Program]:
    """Every jitted program of the run's stages.

    Raises:
      ValueError: a parameter does not divide over the mesh.
    """
    policy = Policy(shape, None, (0,), 0, jnp.dtype(config.model.dtype), "")
    calls = workload.calls(config, assumed)
    found = []
    if "sft" in config.stages:
        found += _of_sft(config, policy, mesh, assumed, calls)
    if "rl" in config.stages:
        found += _of_rl(config, policy, mesh, assumed, calls)
    state = _state(config, "rl", policy, mesh)
    resident = _moments(state) if config.rl.eval_every else 0
    for samples, count in sorted(calls.evaluations.items()):
        name = f"evaluation, {samples} samples"
        given = state.params, resident, mesh, assumed
        found.append(_generation(name, config, "eval", policy, *given, (samples,), count))
    return found


def _of_sft(config: ConfigDict, policy: Policy, mesh: Mesh, assumed: Assumed, calls: workload.Calls) -> list[Program]:
    fields, settings = config.sft, {"dtype": policy.dtype, "remat": config.model.remat}
    state = _state(config, "sft", policy, mesh)
    tx, _ = stage.optimizer(config, "sft", 1)
    update: Any = sft.make_update(policy.config, tx, shardings=_shardings(state), **settings)
    loss: Any = sft.make_losses(policy.config, **settings)

    most = config.data.max_prompt_tokens, fields.max_response_tokens
    responses = workload.lengths(fields.batch, assumed.response_tokens, most[1])
    encoded = {str(i): ([0] * assumed.prompt_tokens, [0] * int(n)) for i, n in enumerate(responses)}
    rows = [{"id": name} for name in encoded]
    encoded["longest"] = ([0] * most[0], [0] * most[1])  # in no batch, but it decides the shapes
    packed, tokens = sft.encode_batch(
        rows, encoded, batch=fields.batch, micro_batch=fields.micro_batch, chunk=logprobs.default_chunk(mesh)
    )
    placed = packing.specs(packed)
    batch = _placed((packed, tokens), (placed, placed.owner), mesh)

    scopes = Scopes("optimizer", (("responses", "responses"),), _trips({"responses": packed}))
    setting = _layer_inputs("sft.micro_batch", packed, policy, mesh)
    parameters, whole = (device_bytes((part, batch)) for part in (state.params, state))
    total = float(responses.sum())
    return [
        Program(
            "SFT update", "sft", partial(update.trace, state, batch), scopes, 0, whole, calls.sft_steps, total, setting
        ),
        Program(
            "SFT validation", "sft", partial(loss.trace, state.params, batch), scopes, _moments(state), parameters,
            calls.sft_validations, total, setting._replace(bytes=0),
        ),
    ]  # fmt: skip


def _of_rl(config: ConfigDict, policy: Policy, mesh: Mesh, assumed: Assumed, calls: workload.Calls) -> list[Program]:
    fields = config.rl
    state = _state(config, "rl", policy, mesh)
    groups = tuple(rl.sampled_groups(fields).values())
    rollout = state.params, _moments(state), mesh, assumed
    found = [_generation("rollout", config, "rl", policy, *rollout, groups, calls.rl_steps)]
    if calls.own_strategies:
        found += [
            _generation(name, config, "rl", policy, *rollout, (group,), calls.own_strategies)
            for name, group in {"own responses": fields.self_tries, "own strategies": 1}.items()
        ]

    tx, _ = stage.optimizer(config, "rl", 1)
    of_batch, of_update = rl.method(fields)
    update: Any = train_step.make_update(
        policy.config, tx, **of_update, dtype=policy.dtype, remat=config.model.remat, shardings=_shardings(state)
    )
    chunk = logprobs.default_chunk(mesh)
    packed = pack_batch(made_up_batch(config, assumed), micro_batch=fields.micro_batch, chunk=chunk, **of_batch)
    batch = _placed(packed, specs(packed), mesh)
    parts = {"old_logp": packed.autonomous, "candidates": packed.candidates}
    parts |= {"autonomous": packed.autonomous, "targets": packed.targets}
    scopes = Scopes("optimizer", tuple((name, name) for name in parts), _trips(parts))
    setting = _layer_inputs("rl.micro_batch", packed.autonomous, policy, mesh)
    tokens = float(packed.lengths.sum() + (0 if packed.guided_lengths is None else packed.guided_lengths.sum()))
    trace = partial(update.trace, state, batch)
    return [
        *found, Program("update", "rl", trace, scopes, 0, device_bytes((state, batch)), calls.rl_steps, tokens, setting)
    ]  # fmt: skip


def made_up_batch(config: ConfigDict, assumed: Assumed) -> Batch:
    """A step's rollouts with the assumed lengths, of which the assumed share is correct."""
    fields, random = config.rl, np.random.default_rng(0)
    most = config.data.max_prompt_tokens
    mask = np.broadcast_to(np.arange(most) >= most - assumed.prompt_tokens, (fields.batch, most))
    prompts = Prompts(np.zeros(mask.shape, np.int32), mask)

    def group(size: int) -> Group:
        shape = fields.batch, size
        count = workload.lengths(fields.batch * size, assumed.response_tokens, fields.max_new_tokens).reshape(shape)
        rewards = (random.random(shape) < assumed.correct).astype(np.float32)
        tokens = np.zeros((*shape, fields.max_new_tokens), np.int32)
        return Group(tokens, count.astype(np.int32), np.zeros(tokens.shape, np.float32), rewards)

    guided = group(fields.guided) if fields.guided else None
    sampled = guided is not None and fields.guide != "demonstration"
    # With other tokens: a guided prompt that is the unguided one would have nothing to distil.
    guided_prompts = Prompts(prompts.tokens + 1, mask) if sampled else None
    return Batch(prompts, guided_prompts, group(fields.autonomous), guided)


def _generation(
    name: str,
    config: ConfigDict,
    section: str,
    policy: Policy,
    params: Any,
    resident: int,
    mesh: Mesh,
    assumed: Assumed,
    groups: tuple[int, ...],
    calls: int,
) -> Program:
    """Sampling groups of these sizes for each problem of a batch, as `generation.respond_in_groups` does."""
    fields, most = config[section], config.data.max_prompt_tokens
    shards, asked = row_ways(mesh), fields.batch * len(groups)
    rows, whole = NamedSharding(mesh, P(BATCH)), NamedSharding(mesh, P())
    prompts = [jax.ShapeDtypeStruct((asked, most), kind, sharding=rows) for kind in (jnp.int32, jnp.bool)]
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(groups)))
    trace = partial(
        generate.trace, params, policy.config, *prompts, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        jax.ShapeDtypeStruct((asked,), jnp.uint32, sharding=rows), group=groups, stop_ids=policy.stop_ids,
        pad_id=policy.pad_id, dtype=policy.dtype, shards=shards,
        **{name: fields[name] for name in ("slots", "max_new_tokens", "temperature", "top_p", "top_k")},
    )  # fmt: skip
    count = fields.batch * sum(groups)
    responses = workload.lengths(count, assumed.response_tokens, fields.max_new_tokens)
    waiting, slots = responses.reshape(shards, -1), min(fields.slots or count, count)
    stages = schedule(waiting, np.full_like(waiting, assumed.prompt_tokens), slots // shards)
    split = mesh.shape["tensor"] if policy.config.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    with jax.set_mesh(mesh):
        cache = jax.eval_shape(
            partial(init_cache, policy.config, slots, most - 1 + fields.max_new_tokens, policy.dtype)
        )
    setting = Setting(f"{section}.slots", slots, whole_bytes(cache) // shards // split)
    token_bytes = 2 * policy.config.num_kv_heads // split * policy.config.head_dim * policy.dtype.itemsize
    scopes = _decoding(stages, count // shards, token_bytes)
    return Program(
        name, section, trace, scopes, resident, device_bytes((params, prompts)), calls, float(responses.sum()), setting
    )


def _decoding(stages: list[Stage], responses: int, token_bytes: int) -> Scopes:
    """How often the loops of the engine run, and what the paged kernel reads of the cache of a layer.

    Args:
      stages: from the engine's schedule.
      responses: of a shard; the prompt of each is copied once.
      token_bytes: of a token's keys and values in one layer on a device.
    """
    refills = float(stages[0].refills)
    trips, reads = [("refill/while$", refills), ("refill/while/body/while$", responses / refills)], []
    for each in stages:
        kernel = f"decode_{each.width}/.*paged_attention"
        blocks = each.cached / each.width / (attention.PAGES_PER_BLOCK * attention.LANES)
        trips += [(kernel, blocks), (f"decode_{each.width}/while$", each.steps / max(each.refills, 1))]
        reads.append((kernel, each.cached * token_bytes))
    return Scopes("prefill", (("decode_", "decode"), ("refill", "refill")), tuple(trips), tuple(reads))


def _layer_inputs(field: str, packed: Packed, policy: Policy, mesh: Mesh) -> Setting:
    """What the backward pass keeps at least: the input of every layer."""
    _, rows, length = packed.contexts[0].tokens.shape
    shape = policy.config
    size = shape.num_layers * length * shape.hidden_size * policy.dtype.itemsize
    split = mesh.shape["tensor"] if length % mesh.shape["tensor"] == 0 else 1
    return Setting(field, rows, rows * size // (row_ways(mesh) * split))


def _trips(parts: dict[str, Packed | None]) -> tuple[tuple[str, float], ...]:
    """Micro-batches of each part, and, in each of them, chunks of response tokens; one optimizer step."""
    chunks, micro_batches = [], [("optimizer/while$", 1.0)]
    for name, packed in parts.items():
        if packed is not None:
            used = packed.chunks[: int(packed.count)]
            chunks.append((rf"{name}.*chunks\)*/while$", float(used.mean()) if len(used) else 0.0))
            micro_batches.append((f"{name}/while$", float(packed.count)))
    return (*chunks, *micro_batches)


def _state(config: ConfigDict, name: str, policy: Policy, mesh: Mesh) -> TrainState:
    """The training state of a stage as shapes on the mesh."""
    tx, _ = stage.optimizer(config, name, 1)
    shapes, shardings = stage.state_shardings(policy, tx, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, state)


def _placed(tree: Any, placed: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=NamedSharding(mesh, spec)),
        tree, placed,
    )  # fmt: skip


def whole_bytes(tree: Any) -> int:
    """Bytes that shapes take on all devices together."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes that shapes on a mesh take on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _moments(state: TrainState) -> int:
    """Bytes of the training state on a device, without the parameters."""
    return device_bytes(state) - device_bytes(state.params)
