"""Worker of the Tunix side, in its own environment: `worker_tunix.py TASK.json RESULT.json`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workload
from common import timed, versions
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig


class Numbers:
    """A tokenizer whose texts are lists of token ids."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self.vocab  # never drawn

    def pad_id(self) -> int:
        return self.vocab - 1


def load(task: dict[str, Any], mesh: jax.sharding.Mesh) -> llama.Llama3:
    """Loads the model in float32."""
    shape = workload.shape(task["shape"])
    config = llama.ModelConfig(
        num_layers=shape.layers, vocab_size=shape.vocab, embed_dim=shape.hidden, hidden_dim=shape.mlp,
        num_heads=shape.heads, head_dim=shape.head_dim, num_kv_heads=shape.kv_heads, rope_theta=100000,
        norm_eps=1e-5, weight_tying=True,
        remat_config=llama.RematConfig.DECODER if task.get("remat") else llama.RematConfig.NONE,
    )  # fmt: skip
    return create_model_from_safe_tensors(task["model"], config, mesh, dtype=jnp.float32)


def generate(task: dict[str, Any]) -> dict[str, Any]:
    """Times rollouts. The sampler decodes every batch until the last of its responses has ended."""
    shape = workload.shape(task["shape"])
    stops = workload.stop_ids(shape, task["median"])
    texts = workload.prompts(shape, task["requests"] // task["group"], task["prompt"], len(stops), task["seed"])
    texts = [" ".join(map(str, row)) for row in np.repeat(texts, task["group"], axis=0)]
    size = task["prompt"] + task["longest"]
    cache = CacheConfig(size, shape.layers, shape.kv_heads, shape.head_dim)
    with mesh() as devices:
        sampler = Sampler(load(task, devices), Numbers(shape.vocab), cache)

        def call(number):
            lengths = []
            for start in range(0, len(texts), task["batch"]):
                out = sampler(
                    texts[start : start + task["batch"]], task["longest"], max_prompt_length=task["prompt"],
                    eos_tokens=stops or None, temperature=1.0, top_p=task["top_p"],
                    seed=1000 * (1000 * task["seed"] + number) + start,
                )  # fmt: skip
                # The sampler leaves the stop token out.
                lengths += [min(len(tokens) + 1, task["longest"]) for tokens in out.tokens]
            return lengths

        lengths, measured = timed(call, task["calls"])
    return measured | {"tokens": list(map(sum, lengths)), "median_length": float(np.median(lengths))}


def update(task: dict[str, Any]) -> dict[str, Any]:
    """Times the actor's update of GRPOLearner. Its first two steps compile."""
    shape = workload.shape(task["shape"])
    data = workload.responses(shape, task)
    rows, pad = data.lengths.size, shape.vocab - 1
    lengths = data.lengths.reshape(-1, 1)
    inside = np.arange(task["longest"]) < lengths
    prompts = np.repeat(data.prompts, task["group"], axis=0)
    completions = np.where(inside, data.tokens.reshape(rows, -1), pad)
    rewards = data.rewards
    spread = rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6
    advantages = ((rewards - rewards.mean(axis=1, keepdims=True)) / spread).reshape(-1)

    with mesh() as devices:
        actor = load(task, devices)
        adamw = optax.adamw(1e-6, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01)
        micro = task["micro_batch"] or rows
        training = RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw), eval_every_n_steps=10**9,
            mini_batch_size=rows, train_micro_batch_size=micro, max_steps=None,
        )  # fmt: skip
        cluster = RLCluster(
            actor=actor, tokenizer=Numbers(shape.vocab),
            cluster_config=ClusterConfig(
                role_to_mesh={role: devices for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
                training_config=training,
                rollout_config=RolloutConfig(
                    max_tokens_to_generate=task["longest"], max_prompt_length=task["prompt"], temperature=1.0,
                    kv_cache_size=task["prompt"] + task["longest"] + 1,
                ),
            ),
        )  # fmt: skip
        config = GRPOConfig(num_generations=max(task["group"], 2), beta=0.0, epsilon=0.2)
        learner = GRPOLearner(cluster, config, reward_fns=lambda prompts, completions, **_: [0.0] * len(prompts))
        trainer = learner.rl_cluster.actor_trainer
        trainer.is_managed_externally = True
        examples = [
            TrainExample(
                prompt_ids=jnp.asarray(prompts[part]),
                prompt_mask=jnp.ones_like(jnp.asarray(prompts[part]), bool),
                completion_ids=jnp.asarray(completions[part], jnp.int32),
                completion_mask=jnp.asarray(inside[part]),
                advantages=jnp.asarray(advantages[part], jnp.float32),
                ref_per_token_logps=None,
                old_per_token_logps=None,
            )
            for part in (slice(start, start + micro) for start in range(0, rows, micro))
        ]
        if not task["calls"]:
            return compiled(trainer, examples[0])

        def call(_):
            cluster.update_actor(examples, None)
            jax.block_until_ready(nnx.state(trainer.model))

        measured = timed(call, task["calls"], warm_up=2)[1]
        # The second step compiles again, for the layout that the first step gave the optimizer state.
        first, *_ = measured["warm_up"]
        return measured | {"compile_seconds": first - float(np.median(measured["seconds"]))}


def compiled(trainer: Any, example: Any) -> dict[str, Any]:
    """Compiles the train step of `trainer`; returns the time, and the temporary memory that the compiler reports."""
    trainer._shard_optimizer(trainer.model.embedder.input_embedding.value.sharding.mesh)
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
    started = time.perf_counter(), time.process_time()
    program = step.lower(trainer.model, trainer.optimizer, example).compile()
    return {
        "compile_seconds": time.perf_counter() - started[0],
        "compile_cpu": time.process_time() - started[1],
        "temporary": program.compiled.memory_analysis().temp_size_in_bytes,
    }


def mesh() -> jax.sharding.Mesh:
    """Returns a mesh of one device with Tunix's axes."""
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    work = {function.__name__: function for function in (generate, update)}[task["work"]]
    result = work(task) | {"versions": versions("google-tunix", "jax", "jaxlib", "flax", "optax", "numpy")}
    Path(sys.argv[2]).write_text(json.dumps(result))
