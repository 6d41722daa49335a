"""The losses in a loop of your own: GRPO and SGPO in plain JAX or Flax NNX, with optax, in half a minute on a CPU.

    python examples/own_loop.py            # plain JAX
    python examples/own_loop.py --nnx      # the same loop around a model of Flax NNX

A problem is a word and two digits, as in `lantern 3 1`. The word decides by which of four methods the digits are
combined; the problem does not say how. A response is the method's token and the result, and only the result is graded.
The strategy of a problem names its method. The warm-up teaches to calculate and to follow a strategy; without one the
model guesses the method, so about half of its answers are right. Then GRPO and SGPO train from there.

What a loop of your own needs from sgpo_jax are functions of arrays, for one sequence or one group, in `losses` and
`logprobs`. They see hidden states and the output head, so it does not matter what the model is made of.

Axis key: B problems, G responses to each, P prompt tokens, T response tokens, N = P + T, D hidden, V vocabulary.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sgpo_jax import logprobs, losses

DIGITS, METHODS, WORDS = 4, 4, 12
NO_STRATEGY = DIGITS + METHODS  # tokens: digits, methods, this one, words
V, D, P, T = NO_STRATEGY + 1 + WORDS, 48, 4, 2
B, G_AUTONOMOUS, G_GUIDED = 32, 8, 4


class Model(NamedTuple):
    """A model as the losses need it; `params` may be any tree of arrays."""

    params: Any
    hidden: Callable[[Any, jax.Array], jax.Array]  # (params, tokens [B,N]) -> states [B,N,D]
    head: Callable[[Any], jax.Array]  # params -> [D,V]


def normalize(x: jax.Array) -> jax.Array:
    """Scales states to a mean square of 1."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def plain_model(key: jax.Array) -> Model:
    """Returns a decoder of one layer in plain JAX."""
    shapes = {"embed": (V, D), "place": (P + T, D), "query": (D, D), "key": (D, D), "value": (D, D),
              "up": (D, 4 * D), "down": (4 * D, D), "head": (D, V)}  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(k, shape) / (D if name in ("embed", "place") else shape[0]) ** 0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

    def hidden(params, tokens):
        count = tokens.shape[1]
        x = params["embed"][tokens] + params["place"][:count]
        query, key, value = (x @ params[name] for name in ("query", "key", "value"))
        scores = jnp.where(jnp.tri(count, dtype=bool), query @ key.mT / D**0.5, -jnp.inf)
        x = normalize(x + jax.nn.softmax(scores) @ value)
        return normalize(x + jax.nn.gelu(x @ params["up"]) @ params["down"])

    return Model(params, hidden, lambda params: params["head"])


class Decoder(nnx.Module):
    """A decoder of one layer in Flax NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.place = nnx.Embed(V, D, rngs=rngs), nnx.Embed(P + T, D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=1, in_features=D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 4 * D, rngs=rngs), nnx.Linear(4 * D, D, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the states `[B,N,D]` before the head."""
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1]))
        x = normalize(x + self.attention(x, mask=nnx.make_causal_mask(tokens)))
        return normalize(x + self.down(nnx.gelu(self.up(x))))


def nnx_model(key: jax.Array) -> Model:
    """Returns a `Decoder`, split into its parameters and a function of them, as transformations of JAX need it."""
    graph, params = nnx.split(Decoder(nnx.Rngs(params=key)))
    return Model(
        params,
        lambda params, tokens: nnx.merge(graph, params)(tokens),
        lambda params: nnx.merge(graph, params).head.kernel[...],
    )


def make_problems(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (prompts without strategy `[B,P]`, prompts with it `[B,P]`, answers `[B]`)."""
    words, a, b = (
        jax.random.randint(k, (count,), 0, n)
        for k, n in zip(jax.random.split(key, 3), (WORDS, DIGITS, DIGITS), strict=True)
    )
    method = words % METHODS
    unguided = jnp.stack([jnp.full(count, NO_STRATEGY), NO_STRATEGY + 1 + words, a, b], axis=1)
    return unguided, unguided.at[:, 0].set(DIGITS + method), combine(method, a, b)


def combine(method: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the results of a method."""
    results = (a + b) % DIGITS, (a - b) % DIGITS, (2 * a + b) % DIGITS, (a - 2 * b) % DIGITS
    return jnp.select([method == i for i in range(METHODS)], results)


def states(model: Model, params: Any, prompts: jax.Array, responses: jax.Array) -> jax.Array:
    """Returns `[G,T,D]`, the states that predict the tokens of each response `[G,T]` after its prompt `[G,P]`."""
    return model.hidden(params, jnp.concatenate([prompts, responses], axis=1))[:, P - 1 : -1]


def sample(model: Model, params: Any, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """Samples a response `[G,T]` to every prompt `[G,P]`."""
    tokens = prompts
    for k in jax.random.split(key, T):
        logits = model.hidden(params, tokens)[:, -1] @ model.head(params)
        tokens = jnp.concatenate([tokens, jax.random.categorical(k, logits)[:, None]], axis=1)
    return tokens[:, P:]


def problem_loss(
    model: Model, params: Any, prompts: tuple[jax.Array, jax.Array], autonomous: jax.Array, guided: jax.Array,
    answer: jax.Array, distil: bool,
) -> jax.Array:  # fmt: skip
    """Computes Eq. 7 for one problem; without `distil` it is Eq. 1, GRPO.

    Args:
      model, params: what is trained.
      prompts: `[P]` without and with the strategy.
      autonomous, guided: `[G,T]` responses to each of them.
      answer: of the problem.
      distil: whether to add the distillation.
    """
    head, mask = model.head(params), jnp.ones(T)
    after = lambda prompt, responses: states(model, params, jnp.tile(prompt, (len(responses), 1)), responses)  # noqa: E731
    of_tokens = jax.vmap(logprobs.token_logprobs, (0, None, 0))

    rewards = (autonomous[:, -1] == answer).astype(jnp.float32)
    logp, _ = of_tokens(after(prompts[0], autonomous), head, autonomous)  # [G,T], nats
    terms = jax.vmap(losses.clipped_surrogate)(
        logp, jax.lax.stop_gradient(logp), losses.group_advantages(rewards)
    )
    loss = jax.vmap(losses.sequence_mean, (0, None))(terms, mask).mean()
    if not distil:
        return loss

    correct = guided[:, -1] == answer
    unguided_states = after(prompts[0], guided)
    unguided_logp, _ = of_tokens(unguided_states, head, guided)
    target, _ = losses.select_target(unguided_logp.sum(axis=1), correct)  # Eq. 4
    token_kl = logprobs.token_kl(after(prompts[1], guided)[target], unguided_states[target], head)  # [T], nats
    alpha = losses.adaptive_weight(rewards.mean(), correct.mean())  # Eq. 6; 0 where no guided response is correct
    return loss + alpha * losses.distillation_loss(token_kl, mask, delta=2.0)  # Eq. 5


def warm_up(model: Model, steps: int, key: jax.Array) -> Any:
    """Returns parameters that can calculate, and follow a strategy where there is one."""
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        keys = jax.random.split(key, 3)
        unguided, guided, _ = make_problems(keys[0], 256)
        shown = jax.random.bernoulli(keys[1], 0.5, (256,))
        method = jnp.where(shown, guided[:, 0] - DIGITS, jax.random.randint(keys[2], (256,), 0, METHODS))
        prompts = jnp.where(shown[:, None], guided, unguided)
        responses = jnp.stack([DIGITS + method, combine(method, prompts[:, 2], prompts[:, 3])], axis=1)
        hidden = states(model, params, prompts, responses)
        logp, _ = jax.vmap(logprobs.token_logprobs, (0, None, 0))(hidden, model.head(params), responses)
        return -logp.mean()

    return _optimize(loss, model.params, optimizer, steps, key)


def train(model: Model, params: Any, distil: bool, steps: int, key: jax.Array) -> Any:
    """Returns parameters after some steps of SGPO, or of GRPO."""

    def loss(params, key):
        keys = jax.random.split(key, 3)
        unguided, guided, answers = make_problems(keys[0], B)
        fixed = jax.lax.stop_gradient(params)
        groups = [
            sample(model, fixed, jnp.repeat(prompts, count, axis=0), k).reshape(B, count, T)
            for prompts, count, k in zip((unguided, guided), (G_AUTONOMOUS, G_GUIDED), keys[1:], strict=True)
        ]
        of_problem = lambda *problem: problem_loss(model, params, problem[:2], *problem[2:], distil)  # noqa: E731
        return jax.vmap(of_problem)(unguided, guided, *groups, answers).mean()

    return _optimize(loss, params, optax.adam(1e-3), steps, key)


def _optimize(loss, params, optimizer, steps, key):
    @jax.jit
    def update(params, state, key):
        gradient = jax.grad(loss)(params, key)
        changes, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, changes), state

    state = optimizer.init(params)
    for step in range(steps):
        params, state = update(params, state, jax.random.fold_in(key, step))
    return params


def accuracy(model: Model, params: Any) -> tuple[float, float]:
    """Returns the shares of right answers to 2,000 problems, (without, with) their strategies."""
    key = jax.random.key(1_000)
    unguided, guided, answers = make_problems(key, 2000)
    right = [sample(model, params, prompts, key)[:, -1] == answers for prompts in (unguided, guided)]
    return float(right[0].mean()), float(right[1].mean())


def main(make: Callable[[jax.Array], Model], steps: int = 50) -> dict[str, tuple[float, float]]:
    """Trains by both methods from the same warm-up, prints the accuracies, and returns them."""
    model = make(jax.random.key(0))
    started = warm_up(model, 400, jax.random.key(1))
    found = {"warm-up": accuracy(model, started)}
    for name, distil in (("GRPO", False), ("SGPO", True)):
        found[name] = accuracy(model, train(model, started, distil, steps, jax.random.key(2)))
    for name, (unguided, guided) in found.items():
        print(f"{name:8} without strategy {unguided:.3f}, with it {guided:.3f}")
    return found


if __name__ == "__main__":
    main(nnx_model if "--nnx" in sys.argv[1:] else plain_model)
