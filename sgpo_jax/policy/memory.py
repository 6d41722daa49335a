"""Slots that fit into the memory of the devices that a run has."""

import dataclasses
import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import models, sharding
from sgpo_jax.models import lora, quantised
from sgpo_jax.models.lora import Lora
from sgpo_jax.policy.policy import Run
from sgpo_jax.rollout import Sampling
from sgpo_jax.rollout.memory import RESERVE, cache_bytes, fitting_slots
from sgpo_jax.rollout.paging import least_tokens
from sgpo_jax.runtime import distributed, is_first

GIB = 2**30


def sampling(run: Run, section: str, responses: int, prompts: int) -> Sampling:
    """Returns the sampling of a section of the config, with as many slots as fit where it asks for all responses.

    Where no device tells the size of its memory, as on CPUs, it is the config's. The number of slots changes no
    response.

    Args:
      run: the run, whose training state is on the devices if it has a stage that trains.
      section: "rl" or "eval".
      responses: that are sampled at once.
      prompts: of all kinds, which are prefilled at once.

    Raises:
      ValueError: the slots that the config asks for do not fit, or not even one of each device does; or its pool does
        not fit, or is too small; or kernels in 8 bits are asked for, and qwix is not installed; or a cache in 8 bits on
        TPUs.
    """
    chosen = Sampling.from_config(run.config[section])
    if chosen.weights:
        quantised.import_qwix(quantised.ROLLOUT_RULE)
    limit, shards = _limit(run.mesh), sharding.row_ways(run.mesh)
    least = least_pool(chosen, section, prompts // shards, run.config.data.max_prompt_tokens, shards)
    if limit is None:
        return chosen
    size = partial(cache_bytes, run.policy.config, dtype=chosen.cache or run.policy.dtype, mesh=run.mesh)
    longest = run.config.data.max_prompt_tokens - 1
    slot, prefilled = size(shards, longest + chosen.max_new_tokens), size(prompts, longest)
    held = _held_bytes(run.config)
    shape, dtype, adapters = run.policy.config, run.policy.dtype, run.policy.lora
    resident = _resident(shape, dtype, held, chosen, run.mesh, adapters, run.config.lora.base_dtype)
    room = limit - resident - prefilled
    if chosen.pool:
        part, pages = size(shards, chosen.page), chosen.pool // chosen.page // shards
        if pages * part > room:
            fit = max(room, 0) // part * chosen.page * shards
            raise ValueError(
                f"config.{section}.pool_tokens={chosen.pool}: takes {pages * part / GIB:.1f} of {room / GIB:.1f} GiB "
                f"that are left on a device; {fit} tokens fit, and at least {least} are needed"
            )
        return chosen
    most = fitting_slots(responses, room - round(RESERVE * limit), slot, shards)
    field, sizes = f"config.{section}.slots", f"of {room / GIB:.1f} GiB that are left on a device"
    if most == 0:
        raise ValueError(
            f"{field}={chosen.slots}: the cache of one slot takes {slot / GIB:.1f} {sizes}; "
            f"needs more devices, config.mesh.tensor or a smaller config.{section}.max_new_tokens"
        )
    asked = min(chosen.slots, responses)
    if asked // shards * slot > room:
        needed = asked // shards * slot
        raise ValueError(f"{field}={chosen.slots}: the caches take {needed / GIB:.1f} {sizes}; {most} slots fit")
    if asked or most == responses:
        return chosen
    _tell(f"{field}=0: {most} of {responses} responses are decoded at once, as many as fit")
    return dataclasses.replace(chosen, slots=most)


def least_pool(chosen: Sampling, section: str, prompts: int, longest: int, shards: int) -> int:
    """Returns the fewest tokens of a pool.

    Args:
      chosen: the sampling of a section of the config; without a pool it needs none.
      section: its name.
      prompts: of a shard.
      longest: most tokens of a prompt.
      shards: parts of the rows.

    Raises:
      ValueError: the pool has fewer.
    """
    least = least_tokens(chosen, prompts, longest, shards) if chosen.pool else 0
    if chosen.pool < least:
        raise ValueError(
            f"config.{section}.pool_tokens={chosen.pool}: must be 0 or at least {least}, for the prompts and one "
            f"longest response in each of {shards} parts of the rows"
        )
    return least


@cache
def _tell(text: str) -> None:
    """Prints a line once."""
    if is_first():
        print(text, flush=True)


@cache
def _limit(mesh: Mesh) -> int | None:
    """Returns the bytes that JAX may use on the smallest device of all processes; None where a device does not say."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min(distributed.gather(min(stat.get("bytes_limit", 0) for stat in stats))) or None


def _held_bytes(config: ConfigDict) -> int:
    """Returns the bytes that the training state holds of a parameter beside its value: both moments, and teachers."""
    if not {"sft", "rl"} & {*config.stages}:
        return 0
    moments = np.dtype(config.optimizer.mu_dtype).itemsize + 4
    if "rl" not in config.stages:
        return moments
    rl = config.rl
    teachers = (rl.teacher in ("frozen", "trust_region") or rl.reference_kl > 0) + (rl.teacher in ("ema", "gated"))
    return moments + teachers * jnp.dtype(rl.teacher_dtype).itemsize


@cache
def _resident(
    config: models.ModelConfig,
    dtype: Any,
    held: int,
    sampling: Sampling,
    mesh: Mesh,
    adapters: Lora | None,
    base_dtype: str,
) -> int:
    """Returns the bytes of a device that the training state takes, and each stage's weights in the products' type.

    With adapters the state is theirs, and there are the base and its merged kernels.

    Args:
      config, dtype, mesh: of the run.
      held: see `_held_bytes`.
      sampling: says how the weights are split, and the type of kernels.
      adapters: their shape; None without.
      base_dtype: type of the base; unused without adapters.
    """
    params = jax.eval_shape(partial(models.init, config=config), jax.random.key(0))

    def on_device(tree, bits=None):
        """Returns the bytes of a device that a tree takes, with the bits of its types or with these."""
        places = sharding.tree_shardings(tree, mesh)
        parts = jax.tree.map(
            lambda x, s: math.prod(s.shard_shape(x.shape)) * (bits or jax.dtypes.itemsize_bits(x.dtype)), tree, places
        )
        return sum(jax.tree.leaves(parts)) // 8

    whole = sum(x.size for x in jax.tree.leaves(params))
    copy = whole * np.dtype(dtype).itemsize
    if sampling.weights:  # the scales are a thousandth of the codes
        copy -= sum(map(math.prod, lora.kernels(config).values())) * (np.dtype(dtype).itemsize - 1)
    decoding = sum(copy // (mesh.shape["tensor"] * ways) for ways in sampling.decode_ways)
    if adapters is None:
        return on_device(params, 8 * (4 + held)) + decoding
    merged = {"layers": {name: {"kernel": params["layers"][name]["kernel"]}
                         for name in lora.merged_kernels(config, adapters, base_dtype)}}  # fmt: skip
    frozen = on_device(lora.base_shapes(config, base_dtype))
    frozen += on_device(merged, 8 * quantised.dtype_of(base_dtype).itemsize)
    return frozen + on_device(lora.shapes(config, adapters), 8 * (4 + held)) + decoding
