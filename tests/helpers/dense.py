"""The loss of a method from its equations, densely: one problem and one response at a time, over the whole vocabulary.

It reads the section rl of a config and shares nothing with the package except the decoder.
"""

import jax
import jax.numpy as jnp
import numpy as np

from helpers.batches import log_probs


def kl(log_p, log_q):
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def picked(full, tokens):
    return full[jnp.arange(len(tokens)), jnp.asarray(tokens)]


def of(group, b, i):
    """(tokens, length) of a response."""
    return group.tokens[b, i], int(group.lengths[b, i])


def advantages(rl, group, b):
    rewards, limit = np.asarray(group.rewards[b], np.float64), group.tokens.shape[2]
    if rl.overlong_buffer:
        over = (np.asarray(group.lengths[b]) - (limit - rl.overlong_buffer)) / rl.overlong_buffer
        rewards = rewards - rl.overlong_penalty * np.clip(over, 0, 1)
    centred = 0 * rewards if len({*rewards.tolist()}) == 1 else rewards - rewards.mean()
    if rl.advantage == "none":
        return 0 * rewards
    values = centred if rl.advantage == "centred" else centred / (rewards.std() or 1.0)
    return values * ~np.asarray(group.cut[b]) if rl.mask_cut else values


def importance(rl, old, sampler):
    """Weights `[length]` of trainer over sampler probabilities, from log-probabilities `[length]`."""
    log_ratio = np.asarray(old, np.float64) - np.asarray(sampler, np.float64)
    if rl.importance == "none":
        return np.ones_like(log_ratio)
    weight = np.exp(log_ratio if rl.importance == "token" else np.full_like(log_ratio, log_ratio.sum()))
    truncated = np.minimum(weight, rl.importance_cap)
    return truncated if rl.importance_rule == "truncate" else weight * (weight <= rl.importance_cap)


def averaged(rl, losses, group):
    """Reduces [(weight, losses `[length]`)] by the rule of the config, and sums the responses."""
    if rl.normaliser == "tokens":
        return sum(w * x.sum() for w, x in losses) / sum(len(x) for _, x in losses) * len(losses)
    if rl.normaliser == "constant":
        return sum(w * x.sum() for w, x in losses) / group.tokens.shape[2]
    return sum(w * x.mean() for w, x in losses)


def policy(rl, params, old, reference, group, prompts, coefficient, kl_coefficient):
    """The policy loss of a group, and the KL to the reference on its tokens: a mean over problems and responses."""
    found = []
    for b in range(len(group.rewards)):
        for i, advantage in enumerate(advantages(rl, group, b)):
            tokens, length = of(group, b, i)
            full = log_probs(params, prompts, b, tokens, length)
            logp, before = (picked(x, tokens[:length]) for x in (full, log_probs(old, prompts, b, tokens, length)))
            ratio = jnp.exp(logp - before)
            if rl.surrogate == "sequence":
                ratio = jnp.exp((logp - before).mean()) * jnp.ones(length)
            weighed = advantage * importance(rl, before, group.logp[b, i, :length])
            clipped = jnp.clip(ratio, 1 - rl.clip_low, 1 + rl.clip_high)
            gain = jnp.minimum(ratio * weighed, clipped * weighed)
            if rl.surrogate == "cispo":
                gain = jax.lax.stop_gradient(clipped) * weighed * logp
            loss = -coefficient * gain
            if kl_coefficient:
                other = log_probs(reference, prompts, b, tokens, length)
                difference = picked(other, tokens[:length]) - logp
                k3 = jnp.exp(difference) - difference - 1
                loss += kl_coefficient * (k3 if rl.reference_kl_kind == "k3" else kl(full, other))
            found.append((1.0, loss))
    return averaged(rl, found, group) / len(found)


def targets(rl, old, batch):
    """[(alpha, problem, response, guided prompts' index)] of Eq. 4 and 6, or all responses of the student's own."""
    if rl.target == "own":
        size = batch.autonomous.rewards.shape[1]
        plain = [np.asarray(tokens).tolist() for tokens in batch.prompts.tokens]
        hints = [np.asarray(tokens).tolist() for tokens in batch.guided_prompts.tokens]
        return [(1 / size, r // size, r % size, r) for r in range(len(hints)) if hints[r] != plain[r // size]]
    chosen = []
    for b, rewards in enumerate(batch.guided.rewards):
        likely = {}
        for j in np.flatnonzero(np.asarray(rewards) == 1):
            tokens, length = of(batch.guided, b, j)
            likely[j] = float(picked(log_probs(old, batch.prompts, b, tokens, length), tokens[:length]).sum())
        p_auto, p_guide = float(np.mean(batch.autonomous.rewards[b])), float(np.mean(rewards))
        alpha = min(max(rl.alpha0 * (p_guide - p_auto + rl.gamma) / (p_auto + rl.gamma), 0.0), rl.alpha_max)
        if likely and alpha:
            chosen.append((alpha, b, max(likely, key=likely.get), b))
    return chosen


def teacher_log_probs(rl, teacher, params, batch, r, tokens, length):
    """`[length,V]` of the teacher, after the guided prompt; `teacher` has the parameters of its own."""
    if rl.teacher == "live":
        return log_probs(params, batch.guided_prompts, r, tokens, length)
    mine = log_probs(teacher, batch.guided_prompts, r, tokens, length)
    if rl.teacher != "trust_region":
        return mine
    student = log_probs(params, batch.guided_prompts, r, tokens, length)
    return jax.nn.log_softmax((1 - rl.teacher_rate) * mine + rl.teacher_rate * student)


def distances(rl, teacher, params, old, batch):
    """[(alpha, divergence `[length]`)] of every target of a batch."""
    found = []
    group = batch.autonomous if rl.target == "own" else batch.guided
    for alpha, b, j, r in targets(rl, old, batch):
        tokens, length = of(group, b, j)
        guided = jax.lax.stop_gradient(teacher_log_probs(rl, teacher, params, batch, r, tokens, length))
        mine = log_probs(params, batch.prompts, b, tokens, length)
        value = kl(mine, guided) if rl.distillation == "reverse_kl" else kl(guided, mine)
        if rl.distillation == "jensen_shannon":
            mixture = jnp.log((1 - rl.beta) * jnp.exp(mine) + rl.beta * jnp.exp(guided))
            value = (1 - rl.beta) * kl(mine, mixture) + rl.beta * kl(guided, mixture)
        found.append((alpha, value))
    return found


def distillation(rl, teacher, params, old, batch):
    """L_KD times alpha (Eq. 5, 6), by the rule for tokens above delta: a mean over problems."""
    delta, found = rl.delta, []
    if rl.delta_quantile:
        delta = np.quantile(np.concatenate([d for _, d in distances(rl, teacher, old, old, batch)]), rl.delta_quantile)
    for alpha, d in distances(rl, teacher, params, old, batch):
        constant = jax.lax.stop_gradient(d)
        weight = {"mask": constant <= delta, "scale": jnp.minimum(1, delta / jnp.maximum(constant, 1e-9)), "none": 1.0}
        found.append((alpha, weight[rl.token_rule] * d))
    problems, size = batch.autonomous.rewards.shape
    shared = size if rl.normaliser == "constant" else 1  # all tokens weigh the same, those of targets too
    return averaged(rl, found, batch.autonomous) / problems / shared


def loss(params, rl, old, batch, teacher=None):
    """The whole loss. `teacher` has the parameters of the teacher, and of the reference policy."""
    on_all = rl.reference_kl if rl.reference_kl_on == "all" else 0.0
    total = policy(rl, params, old, teacher, batch.autonomous, batch.prompts, 1.0, on_all)
    if rl.guided_grpo or (rl.reference_kl and batch.guided is not None):
        plain = type(rl)(rl.to_dict() | {"overlong_buffer": 0, "mask_cut": False, "advantage": "group"})
        total += policy(
            plain, params, old, teacher, batch.guided, batch.guided_prompts, rl.guided_grpo, rl.reference_kl
        )
    if batch.guided_prompts is not None:
        total += distillation(rl, teacher, params, old, batch)
    return total
