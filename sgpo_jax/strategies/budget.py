"""The budget of an extraction: counts what it has spent, and works on many problems at once within the limits."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from sgpo_jax.runtime.journal import Journal, Key
from sgpo_jax.strategies import prompts
from sgpo_jax.strategies.clients import Ask
from sgpo_jax.strategies.faults import Denied, Failed, Refused, Unavailable
from sgpo_jax.strategies.replies import Reply, Request

# (stage, index, prompt, choices, max_tokens) -> reply, from the journal if it is there
Paid = Callable[[str, int, str, int, int], Reply]
_OVERHEAD = 64  # tokens of the chat template around a prompt, at most


class BudgetReached(Exception):
    """The next request could exceed the budget."""


class Meter:
    """A meter of calls, retries, tokens and cost that keeps them within a budget; may be used from any thread.

    A request may start only if its largest possible use still fits, in addition to the requests under way. So the
    budget holds if the server counts correctly. What it charges for requests that break off is unknown.

    Args:
      price_in: price of a million prompt tokens.
      price_out: price of a million reply tokens.
      budget_tokens: most tokens; 0 is no limit.
      budget_cost: highest cost; 0 is no limit.
    """

    def __init__(self, price_in: float, price_out: float, budget_tokens: int = 0, budget_cost: float = 0.0):
        self._prices = price_in / 1e6, price_out / 1e6
        self._limits = budget_tokens or float("inf"), budget_cost or float("inf")
        self._changed = threading.Condition()
        self._reserved = [0, 0]  # most tokens in and out of the requests under way
        self.calls = self.retries = self.tokens_in = self.tokens_out = 0
        self.reasons: Counter[str] = Counter()  # retries by the kind of fault, which a reason has before its first ":"
        self.last: dict[str, str] = {}  # kind of fault -> the last reason

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Returns the cost of some tokens."""
        return tokens_in * self._prices[0] + tokens_out * self._prices[1]

    @property
    def spent(self) -> float:
        """The cost of everything counted."""
        return self.cost(self.tokens_in, self.tokens_out)

    def retried(self, why: str) -> None:
        """Counts a retry."""
        kind = kind_of(why)
        with self._changed:
            self.retries += 1
            self.reasons[kind] += 1
            self.last[kind] = why

    def count(self, tokens_in: int, tokens_out: int) -> None:
        """Counts a call with its tokens."""
        with self._changed:
            self.calls += 1
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    def reserve(self, most: tuple[int, int]) -> None:
        """Waits until a request that uses at most these tokens (in, out) fits into the budget, and reserves them.

        Raises:
          BudgetReached: it does not fit although no other request is under way.
        """
        with self._changed:
            while not self._fits(most):
                if not any(self._reserved):
                    limits = [f"{limit:g}" for limit in self._limits if limit != float("inf")]
                    raise BudgetReached(
                        f"the budget ({' and '.join(limits)}) is reached: {self.tokens_in + self.tokens_out} tokens, "
                        f"cost {self.spent:.4f}, and the next request could take {sum(most)} tokens"
                    )
                self._changed.wait()
            self._reserved = [a + b for a, b in zip(self._reserved, most, strict=True)]

    def release(self, most: tuple[int, int]) -> None:
        """Ends a reservation."""
        with self._changed:
            self._reserved = [a - b for a, b in zip(self._reserved, most, strict=True)]
            self._changed.notify_all()

    def _fits(self, most: tuple[int, int]) -> bool:
        tokens_in = self.tokens_in + self._reserved[0] + most[0]
        tokens_out = self.tokens_out + self._reserved[1] + most[1]
        return tokens_in + tokens_out <= self._limits[0] and self.cost(tokens_in, tokens_out) <= self._limits[1]


def kind_of(why: str) -> str:
    """Returns the kind of fault in a reason such as "429: slow down"."""
    return re.sub("^[0-9]+ tries, the last one: ", "", why).partition(":")[0][:60]


def digest(*parts: str | None) -> str:
    """Returns a short digest by which equal texts are recognised later."""
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def payer(id: str, ask: Ask, journal: Journal, meter: Meter, model: str, stop: threading.Event) -> Paid:
    """Returns `paid` for one problem: it returns the journal's reply to a request, or else sends the request.

    A new reply is in the journal before it is returned.

    Args:
      id: the problem's id.
      ask: sends a request.
      journal: where replies are kept.
      meter: counts new replies and holds the budget.
      model: the model's name, for the records.
      stop: no new request is sent once it is set.
    """

    def keep(key: Key, reply: Reply) -> dict[str, Any]:
        named_key = dict(zip(("id", "stage", "index", "prompt"), key, strict=True))
        origin = {"model": model, "version": prompts.PROMPT_VERSION}
        cost = meter.cost(reply.prompt_tokens, reply.completion_tokens)
        record = {"kind": "reply", **named_key, **reply._asdict(), "cost": cost, **origin}
        meter.count(reply.prompt_tokens, reply.completion_tokens)
        journal.append(record)
        return record

    def paid(stage: str, index: int, prompt: str, choices: int, max_tokens: int) -> Reply:
        key = id, stage, index, digest(prompt)
        record = journal.reply(key)
        if record is None:
            if stop.is_set():
                raise Unavailable("stopped")
            most = len(prompt.encode()) + _OVERHEAD, choices * max_tokens
            meter.reserve(most)
            try:
                record = keep(key, ask(Request(f"{id}/{stage}/{index}", prompt, choices, max_tokens)))
            except Failed as error:
                if any(error.lost):  # counts for the budget of all runs; nothing asks for a reply of this stage
                    keep((id, f"{stage}/lost", index, key[3]), Reply([], [], *error.lost))
                raise
            finally:
                meter.release(most)
        return Reply(*(record[field] for field in Reply._fields))

    return paid


def work_through(
    rows: Sequence[dict[str, str]],
    work: Callable[[dict[str, str]], str],
    *,
    concurrency: int,
    max_failures: int,
    stop: threading.Event,
    done: Callable[[str], None],
) -> str:
    """Runs `work` on every row in threads. When it stops early, the requests under way are finished first.

    Args:
      rows: problems.
      work: row -> reason of its verdict.
      concurrency: rows worked on at once.
      max_failures: consecutive rows with failed requests after which it stops.
      stop: set when it stops; `work` must check it before each request and while it waits for a retry.
      done: called after each row with the reason of its verdict, or with "left_open".

    Returns:
      What is not finished and why, or "".
    """

    def guarded(row: dict[str, str]) -> str | None:
        if stop.is_set():
            return None
        try:
            return work(row)
        except (Denied, BudgetReached):
            stop.set()  # at once, so that no other thread starts a request
            raise

    why, failures, last = "", 0, ""
    left_open: Counter[str] = Counter()
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(guarded, row) for row in rows]
        try:
            for future in as_completed(futures):
                try:
                    reason = future.result()
                except (Denied, BudgetReached) as error:
                    why = why or f"stopped early: {error}"
                except (Refused, Unavailable) as error:
                    done("left_open")
                    failures += 1
                    if not stop.is_set():
                        last = str(error)
                        left_open[kind_of(last)] += 1
                    if failures >= max_failures and not stop.is_set():
                        why = f"stopped early: {failures} problems in a row could not be finished"
                        stop.set()
                else:
                    failures = 0
                    if reason is not None:
                        done(reason)
        except KeyboardInterrupt:
            why = "stopped early: interrupted"
        finally:
            stop.set()
    if left_open:
        counts = ", ".join(f"{count} for {kind}" for kind, count in left_open.most_common(8))
        why += f"{'; ' if why else ''}left open: {counts}; the last because of {last}"
    return why
