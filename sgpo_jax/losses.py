"""The objectives of SGPO as pure functions of arrays: one sequence or one group at a time, `jax.vmap` for more.

Axis key: G group, T response tokens, V vocabulary. Everything is computed in float32; log-probabilities and KL are in
nats. KL is named by direction: forward KL is KL(guided || unguided). Equation numbers refer to arXiv 2606.24064. The
baselines follow LUFFY (arXiv 2504.14945) and HPT (a unified view of post-training, arXiv 2509.04419).
"""

import chex
import jax
import jax.numpy as jnp


def group_advantages(rewards: jax.Array, eps: float = 1e-6, scale: bool = True) -> jax.Array:
    """Computes the advantages of one group of responses to the same problem.

    `A_i = (R_i - mean(R)) / (std(R) + eps)`, population std. Eq. 1.

    Args:
      rewards: `[G]` rewards.
      eps: keeps the quotient finite for nearly equal rewards.
      scale: False leaves out the division, as LUFFY and HPT do.

    Returns:
      `[G]` float32; all zero when every reward is the same. No gradient flows into it.
    """
    chex.assert_rank(rewards, 1)
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.float32))
    # Compare the rewards themselves: the float32 mean of equal rewards can differ from them in the last bit.
    constant = jnp.all(rewards == rewards[0])
    centred = rewards - rewards.mean()
    return jnp.where(constant, 0.0, centred / (rewards.std() + eps) if scale else centred)


def clipped_surrogate(
    logp: jax.Array,
    old_logp: jax.Array,
    advantage: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> jax.Array:
    """Computes the policy loss of each token of one response: the negated term of Eq. 1.

    `-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)` with `rho = exp(logp - old_logp)`.

    Args:
      logp: `[T]` log-probabilities under the current policy; the gradient flows through this argument only.
      old_logp: `[T]` log-probabilities under the policy that sampled.
      advantage: `[]` advantage of the response, or `[T]` advantages of its tokens.
      clip_low: largest decrease of the ratio that is still rewarded.
      clip_high: largest increase of the ratio that is still rewarded.

    Returns:
      `[T]` float32 loss, unmasked; reduce it with `sequence_mean`.
    """
    chex.assert_rank([logp, old_logp, advantage], [1, 1, {0, 1}])
    chex.assert_equal_shape([logp, old_logp] + [advantage] * advantage.ndim)
    old_logp = jax.lax.stop_gradient(old_logp.astype(jnp.float32))
    advantage = jax.lax.stop_gradient(advantage.astype(jnp.float32))
    # Keep exp from overflowing: inf times an advantage or a gradient of 0 would be NaN.
    ratio = jnp.exp(jnp.minimum(logp.astype(jnp.float32) - old_logp, 80.0))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def cispo(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, clip_low: float = 1.0, clip_high: float = 0.28
) -> jax.Array:
    """Computes CISPO's policy loss of each token: the clipped ratio is a weight, so every token keeps a gradient.

    `-sg[clip(rho, 1 - clip_low, 1 + clip_high)] A logp`. MiniMax-M1, arXiv 2506.13585, Eq. 4.

    Args and returns: as `clipped_surrogate`; a clip_low of 1 is no lower limit, as in the paper.
    """
    chex.assert_equal_shape([logp, old_logp])
    logp = logp.astype(jnp.float32)
    ratio = jnp.exp(jnp.minimum(jax.lax.stop_gradient(logp) - old_logp, 80.0))
    return -jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage) * logp


def sequence_log_ratio(difference: jax.Array, mask: jax.Array, owner: jax.Array, responses: int) -> jax.Array:
    """Computes the logarithm of GSPO's ratio of each response: the mean over its tokens of `logp - old_logp`.

    `s_i = (pi(o_i) / pi_old(o_i))^(1 / |o_i|)`. GSPO, arXiv 2507.18071, Eq. 7.

    Args:
      difference: `[N]` logp - old_logp of tokens, nats.
      mask: `[N]` bool or 0/1, 1 on tokens of responses.
      owner: `[N]` number of the response that a token belongs to.
      responses: G, number of responses.

    Returns:
      `[G]` float32; 0 for a response without tokens.
    """
    chex.assert_equal_shape([difference, mask, owner])
    owner = jnp.where(mask != 0, owner, responses)  # out of range: dropped
    total, count = (
        jax.ops.segment_sum(x, owner, responses) for x in (difference.astype(jnp.float32), jnp.ones_like(difference))
    )
    return total / jnp.maximum(count, 1.0)


def k3_kl(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
    """Computes an estimate of KL(policy || reference) from a sampled token: `e^r - r - 1`, `r = reference_logp - logp`.

    It is at least 0, and unbiased for tokens of the policy. Schulman's k3, as in GRPO (arXiv 2402.03300, Eq. 4).

    Args:
      logp, reference_logp: `[T]` log-probabilities, nats; the gradient flows through the first.

    Returns:
      `[T]` float32, nats.
    """
    chex.assert_equal_shape([logp, reference_logp])
    ratio = jnp.minimum(jax.lax.stop_gradient(reference_logp).astype(jnp.float32) - logp.astype(jnp.float32), 80.0)
    return jnp.expm1(ratio) - ratio


def importance_weight(log_ratio: jax.Array, cap: float, rule: str = "truncate") -> jax.Array:
    """Computes the weight that corrects for a sampler whose probabilities are not the trainer's.

    `w = pi_trainer / pi_sampler`, `min(w, cap)` or, with the rule "mask", w where it is at most the cap and else 0.
    Truncated importance sampling, Ionides 2008; as in verl.

    Args:
      log_ratio: `[...]` trainer's minus sampler's log-probability of a token, or their sum over a response; nats.
      cap: largest weight.
      rule: "truncate" or "mask".

    Returns:
      `[...]` float32, without gradient.
    """
    weight = jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_ratio.astype(jnp.float32), 80.0)))
    return jnp.minimum(weight, cap) if rule == "truncate" else jnp.where(weight <= cap, weight, 0.0)


def overlong_penalty(lengths: jax.Array, longest: int, buffer: int, penalty: float = 1.0) -> jax.Array:
    """Computes DAPO's soft penalty of long responses, which is added to their rewards. Arxiv 2503.14476, Eq. 13.

    `-penalty clip((length - (longest - buffer)) / buffer, 0, 1)`: 0 up to the buffer, -penalty at the limit.

    Args:
      lengths: `[...]` tokens.
      longest: tokens at which a response is cut.
      buffer: tokens before the limit over which the penalty grows; 0 is no penalty.
      penalty: at the limit.

    Returns:
      `[...]` float32, at most 0.
    """
    lengths = jnp.asarray(lengths, jnp.float32)
    return -penalty * jnp.clip((lengths - (longest - buffer)) / max(buffer, 1), 0.0, 1.0) * (buffer > 0)


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Computes KL(p || q) over the last axis; forward KL is `kl_divergence(guided, unguided)`. Eq. 2, 3.

    `sum_v p_v (log p_v - log q_v)`; an outcome with `p_v = 0` contributes 0.

    Args:
      log_p: `[..., V]` normalised log-probabilities of p, the distribution that the expectation is under.
      log_q: `[..., V]` normalised log-probabilities of q.

    Returns:
      `[...]` float32, nats. Differentiable in both arguments; stop gradients where the method asks for it.
    """
    chex.assert_equal_shape([log_p, log_q])
    log_p, log_q = log_p.astype(jnp.float32), log_q.astype(jnp.float32)
    p = jnp.exp(log_p)
    possible = p != 0
    # Select before multiplying: 0 * inf would be NaN, also in the gradient. NaN inputs still give NaN.
    difference = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(p * difference, axis=-1)


def kl_clip_mask(token_kl: jax.Array, delta: float) -> jax.Array:
    """Computes the weights `w_t` of Eq. 5: 1 where the token's KL is at most delta, else 0.

    Args:
      token_kl: `[T]` KL per token, nats.
      delta: largest KL that is distilled, nats; `inf` keeps every token.

    Returns:
      `[T]` float32 of 0 and 1, without gradient.
    """
    chex.assert_rank(token_kl, 1)
    return jax.lax.stop_gradient((token_kl <= delta).astype(jnp.float32))


def kl_clip_scale(token_kl: jax.Array, delta: float) -> jax.Array:
    """Computes weights that bound a token's pull and keep it: `min(1, delta / d_t)`, where Eq. 5 has 1 or 0.

    The loss of a token is then at most delta, and its gradient that of the KL, shrunk as much.

    Args:
      token_kl: `[T]` KL per token, nats.
      delta: largest loss of a token, nats.

    Returns:
      `[T]` float32 in [0, 1], without gradient; 0 for an infinite KL.
    """
    chex.assert_rank(token_kl, 1)
    above = token_kl > delta  # the division is for these alone: rounding may leave a KL just below 0
    return jax.lax.stop_gradient(jnp.where(above, delta / jnp.where(above, token_kl, 1.0), 1.0).astype(jnp.float32))


def clipped_kl(token_kl: jax.Array, delta: float, rule: str = "mask") -> jax.Array:
    """Computes the distillation loss of each token: `w_t d_t`, the summand of Eq. 5.

    Args:
      token_kl: `[T]` KL per token `d_t`, nats; KL(guided || unguided) for the forward KL.
      delta: largest KL that is distilled, nats; or `[T]`.
      rule: "mask", `kl_clip_mask`, as published; "scale", `kl_clip_scale`; "none", all weights are 1.

    Returns:
      `[T]` float32: the weighted KL, or 0 where the weight is 0; the gradient flows through the other tokens.
    """
    token_kl = token_kl.astype(jnp.float32)
    if rule == "none":
        return token_kl
    # Select rather than multiply, so that an infinite KL is dropped too and does not give inf * 0.
    if rule == "mask":
        return jnp.where(kl_clip_mask(token_kl, delta) > 0, token_kl, 0.0)
    weight = kl_clip_scale(token_kl, delta)
    return jnp.where(weight > 0, weight * jnp.where(weight > 0, token_kl, 0.0), 0.0)


def kl_quantile(token_kl: jax.Array, mask: jax.Array, quantile: float) -> jax.Array:
    """Computes a delta that leaves a share of the tokens below it: the quantile of their KLs, interpolated linearly.

    Args:
      token_kl: `[...]` KL per token, nats.
      mask: `[...]` bool or 0/1, 1 on the tokens that count.
      quantile: share of the tokens, in [0, 1].

    Returns:
      `[]` float32, nats, without gradient; NaN, which no KL is at most, where there are no tokens.
    """
    chex.assert_equal_shape([token_kl, mask])
    counted = jnp.where(mask != 0, token_kl.astype(jnp.float32), jnp.nan)
    return jax.lax.stop_gradient(jnp.nanquantile(counted, quantile))


def select_target(unguided_logp: jax.Array, correct: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Selects the reachable target o+: the correct guided response the unguided policy finds most likely. Eq. 4.

    Args:
      unguided_logp: `[G]` log-probability of each whole guided response without the strategy: a sum over its tokens,
        not a mean, nats.
      correct: `[G]` bool or 0/1, whether the response is correct.

    Returns:
      (index `[]` int32, found `[]` bool). Index 0 and found False when none is correct; the lowest index wins a tie.
      A correct response with log-probability NaN is never chosen.
    """
    chex.assert_rank([unguided_logp, correct], 1)
    chex.assert_equal_shape([unguided_logp, correct])
    correct = (correct != 0) & ~jnp.isnan(unguided_logp)
    # Clamp above -inf, so that a correct response of probability 0 still beats an incorrect one.
    score = jnp.maximum(unguided_logp.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    index = jnp.argmax(jnp.where(correct, score, -jnp.inf)).astype(jnp.int32)
    return index, jnp.any(correct)


def adaptive_weight(
    p_auto: jax.Array,
    p_guide: jax.Array,
    alpha0: float = 0.5,
    gamma: float = 0.1,
    alpha_max: float = 0.8,
) -> jax.Array:
    """Computes the weight of a problem's distillation term, which is large when the strategy helps. Eq. 6.

    `clip(alpha0 (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max)`.

    Args:
      p_auto: `[...]` mean reward of the autonomous group, in [0, 1].
      p_guide: `[...]` mean reward of the guided group, in [0, 1].
      alpha0: scale.
      gamma: smoothing, keeps the quotient finite.
      alpha_max: upper limit.

    Returns:
      `[...]` float32 in [0, alpha_max], without gradient.
    """
    p_auto, p_guide = jnp.asarray(p_auto, jnp.float32), jnp.asarray(p_guide, jnp.float32)
    chex.assert_equal_shape([p_auto, p_guide])
    weight = alpha0 * (p_guide - p_auto + gamma) / (p_auto + gamma)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, alpha_max))


def group_advantage_weight(
    auto_rewards: jax.Array, target_reward: jax.Array, alpha_max: float = 0.8, eps: float = 1e-6
) -> jax.Array:
    """Computes the alternative weight of Eq. 8: the advantage of the target within the group it would join.

    `clip((R(o+) - mean(G)) / (std(G) + eps), 0, alpha_max)`, G = the autonomous rewards and R(o+), population std.

    Args:
      auto_rewards: `[G]` rewards of the autonomous group.
      target_reward: `[]` reward of the target.
      alpha_max: upper limit.
      eps: keeps the quotient finite.

    Returns:
      `[]` float32 in [0, alpha_max], without gradient.
    """
    chex.assert_rank([auto_rewards, target_reward], [1, 0])
    group = jnp.append(auto_rewards.astype(jnp.float32), target_reward.astype(jnp.float32))
    return jnp.clip(group_advantages(group, eps)[-1], 0.0, alpha_max)


def shaped_likelihood(logp: jax.Array, shaping: float = 0.1) -> jax.Array:
    """Computes LUFFY's loss of each token of a demonstration, before its product with the demonstration's advantage.

    `-f(p)`, `f(p) = p / (p + shaping)`, `p = exp(logp)`. Here p is the importance ratio of a demonstration whose author
    is assumed to be certain of every token. The shaping f keeps a gradient for unlikely tokens:
    `shaping p / (p + shaping)^2` times that of log p, which is largest, 1/4, at p = shaping.

    Args:
      logp: `[T]` log-probabilities of the demonstration under the current policy.
      shaping: gamma of LUFFY, above 0.

    Returns:
      `[T]` float32 loss, in (-1, 0].
    """
    return -jax.nn.sigmoid(logp.astype(jnp.float32) - jnp.log(jnp.float32(shaping)))


def hpt_gate(rewards: jax.Array, gate: float = 0.0) -> jax.Array:
    """Computes HPT's switch for one problem: 1 trains on its responses by RL, 0 imitates the demonstration.

    It is 1 when the mean reward is above the gate.

    Args:
      rewards: `[G]` rewards of the policy's own responses.
      gate: largest mean reward at which the demonstration takes over; HPT uses 0 for Qwen and 0.25 for Llama.

    Returns:
      `[]` float32 of 0 or 1, without gradient.
    """
    chex.assert_rank(rewards, 1)
    return jax.lax.stop_gradient((rewards.astype(jnp.float32).mean() > gate).astype(jnp.float32))


def sequence_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the mean over the tokens of one response: `sum(x mask) / max(sum(mask), 1)`.

    Args:
      x: `[T]` values; those outside the mask are ignored, even when not finite.
      mask: `[T]` bool or 0/1, 1 on the response's tokens.

    Returns:
      `[]` float32; 0 for an empty response.
    """
    chex.assert_rank([x, mask], 1)
    chex.assert_equal_shape([x, mask])
    inside = mask != 0
    return jnp.sum(jnp.where(inside, x.astype(jnp.float32), 0.0)) / jnp.maximum(jnp.sum(inside), 1)


def distillation_loss(token_kl: jax.Array, mask: jax.Array, delta: float, rule: str = "mask") -> jax.Array:
    """Computes the clipped KL of one target: tokens above delta leave the sum but count in its length. Eq. 5.

    `1/|o+| sum_t w_t d_t`, `w_t = 1 if d_t <= delta else 0`.

    Args:
      token_kl: `[T]` KL per token, nats.
      mask: `[T]` bool or 0/1, 1 on the response's tokens.
      delta, rule: see `clipped_kl`.

    Returns:
      `[]` float32; 0 for an empty response.
    """
    chex.assert_rank([token_kl, mask], 1)
    return sequence_mean(clipped_kl(token_kl, delta, rule), mask)
