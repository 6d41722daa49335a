"""Responses on the terminal while they are sampled: the first one word by word, the others in turn."""

from collections.abc import Sequence
from typing import Any

from sgpo_jax.policy import Policy


class Text:
    """The text of a response, of which one token after the other becomes known."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._tokens = tokenizer, list[int]()
        self._context = self._read = 0  # the last piece is decoded again: a token's text may depend on the one before

    def add(self, token: int) -> str:
        """Returns what a token adds to the text; "" in the middle of a character."""
        self._tokens.append(token)
        before, text = (
            str(self._tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for part in (self._tokens[self._context : self._read], self._tokens[self._context :])
        )
        if text.endswith("\ufffd"):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return text[len(before) :]


class Stream:
    """Prints the responses of a batch in their order.

    Args:
      policy: for its tokenizer and its stop tokens.
      rows: B problems.
      samples: G, responses to each.
      shards: W, parts of the batch.
      batch: problems in all shards; those beyond `rows` only fill it up.
    """

    def __init__(self, policy: Policy, rows: Sequence[dict], samples: int, shards: int, batch: int):
        self._policy, self._rows, self._samples = policy, rows, samples
        self._per_shard = batch // shards * samples
        self._tokens: list[dict[int, int]] = [{} for _ in range(len(rows) * samples)]  # place -> token
        self._now = -1  # the response that is being printed
        self._open()

    def watch(self, response: Any, place: Any, token: Any) -> None:
        """Takes the tokens of a decoding step; see `Sampling.watch`."""
        for shard, slots in enumerate(response.tolist()):
            for index, at, new in zip(slots, place[shard].tolist(), token[shard].tolist(), strict=True):
                number = shard * self._per_shard + index
                if index < self._per_shard and number < len(self._tokens):
                    self._tokens[number][at] = new
        self._show()

    def end(self) -> None:
        """Prints what is left, when all responses have ended."""
        while self._now < len(self._tokens):
            self._show()
            if self._now < len(self._tokens):
                self._open()

    def _show(self) -> None:
        while self._now < len(self._tokens):
            known = self._tokens[self._now]
            while self._printed in known:
                token = known[self._printed]
                self._printed += 1
                if token in self._policy.stop_ids:
                    self._open()
                    break
                print(self._text.add(token), end="", flush=True)
            else:
                return

    def _open(self) -> None:
        """Begins the next response."""
        if self._now >= 0:
            print(flush=True)
        self._now, self._printed, self._text = self._now + 1, 0, Text(self._policy.tokenizer)
        if self._now < len(self._tokens) > 1:
            row, sample = divmod(self._now, self._samples)
            name = self._rows[row].get("id", row + 1)
            of = f", sample {sample + 1} of {self._samples}" * (self._samples > 1)
            print(f"\n[question {name}{of}]", flush=True)
