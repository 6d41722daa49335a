"""Checks that prompts and responses fit into the positions that a model was made for."""

from collections.abc import Mapping, Sequence

from sgpo_jax.policy.policy import Policy
from sgpo_jax.runtime import is_first


def check_limit(policy: Policy, prompts: Sequence[Sequence[int]], field: str, limit: int, what: str) -> None:
    """Checks the longest allowed response to each of some prompts, before any is sampled.

    If it fits after no prompt, the limit is refused. If it fits after some, a line says so: shorter responses to the
    other prompts are sound.

    Args:
      policy: the policy that is to respond.
      prompts: token ids of each prompt.
      field: field of the config that limits the response, such as "rl.max_new_tokens".
      limit: its value, tokens.
      what: whose prompts they are.

    Raises:
      ValueError: even the shortest prompt and `limit` tokens are more than the model's positions.
    """
    if not prompts:
        return
    positions, lengths = policy.config.reach, [len(prompt) for prompt in prompts]
    shortest, longest = min(lengths), max(lengths)
    if shortest + limit > positions:
        room = positions - (longest if longest < positions else shortest)
        allowed = f"at most {room}" if room > 0 else "for a model with more positions"
        raise ValueError(
            f"config.{field}={limit}: must be {allowed}: the model has {positions} positions "
            f"(max_position_embeddings), and the prompts of {what} have {shortest} to {longest} tokens"
        )
    if longest + limit > positions and is_first():
        count = sum(length + limit > positions for length in lengths)
        print(
            f"warning: config.{field}={limit}: together with it, {count} of {len(lengths)} prompts of {what} can "
            f"exceed the model's {positions} positions; the longest prompt has {longest} tokens",
            flush=True,
        )


def check_rows(policy: Policy, encoded: Mapping[str, tuple[Sequence[int], Sequence[int]]], fields: str) -> None:
    """Checks rows whose responses are known.

    Args:
      policy: the policy that reads them.
      encoded: id -> prompt and response tokens.
      fields: the fields that could leave out longer rows, and their values.

    Raises:
      ValueError: a row is longer than the model's positions.
    """
    positions = policy.config.reach
    long = {id: parts for id, parts in encoded.items() if sum(map(len, parts)) > positions}
    if long:
        first, (prompt, response) = next(iter(long.items()))
        raise ValueError(
            f"{fields}: must leave out rows that are longer than the model's {positions} positions "
            f"(max_position_embeddings), {len(long)} of {len(encoded)}; the first is {first}, with {len(prompt)} "
            f"tokens of prompt and {len(response)} of response"
        )
