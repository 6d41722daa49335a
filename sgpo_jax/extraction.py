"""One problem's way to a strategy, and many problems at once: every reply is written down before it is used.

`extract` and `rate` are plain functions that ask their questions through `paid`. It looks for the reply in the journal
first, so running a function again from the start is how a killed extraction goes on.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from sgpo_jax import leakage, prompts, rewards, strategy_text
from sgpo_jax.llm import Ask, Denied, Refused, Reply, Request, TooLong, Unavailable
from sgpo_jax.runtime.journal import Journal

# (stage, number, prompt, choices, max_tokens) -> reply
Paid = Callable[[str, int, str, int, int], Reply]
_OVERHEAD = 64  # tokens of the chat template around a prompt, at most


class BudgetReached(Exception):
    """The next request could exceed the budget."""


class Meter:
    """Counts calls, retries, tokens and cost; keeps their sum below a budget, from any thread.

    A request is let through only when the most it can use still fits, together with those under way. So the budget
    holds as far as the server counts honestly; what it charges for requests that break off is unknown.

    Args:
      price_in, price_out: per million tokens.
      budget_tokens, budget_cost: 0 is no limit.
    """

    def __init__(self, price_in: float, price_out: float, budget_tokens: int = 0, budget_cost: float = 0.0):
        self._prices = price_in / 1e6, price_out / 1e6
        self._limits = budget_tokens or float("inf"), budget_cost or float("inf")
        self._changed = threading.Condition()
        self._reserved = [0, 0]  # tokens in and out of the requests under way, at most
        self.calls = self.retries = self.tokens_in = self.tokens_out = 0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return tokens_in * self._prices[0] + tokens_out * self._prices[1]

    @property
    def spent(self) -> float:
        """Cost of everything counted."""
        return self.cost(self.tokens_in, self.tokens_out)

    def retried(self, why: str) -> None:
        with self._changed:
            self.retries += 1

    def count(self, tokens_in: int, tokens_out: int) -> None:
        """Adds one call."""
        with self._changed:
            self.calls += 1
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    def reserve(self, most: tuple[int, int]) -> None:
        """Waits until a request that uses at most so many tokens (in, out) fits into the budget.

        Raises:
          BudgetReached: it does not fit, and no other request is under way.
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


def digest(*parts: str | None) -> str:
    """A short name for texts that must be the same again."""
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def payer(id: str, ask: Ask, journal: Journal, meter: Meter, model: str, stop: threading.Event) -> Paid:
    """`paid` for one problem: the journal's reply to a request, or a new one, in the journal before it is used.

    Nothing new is asked for once `stop` is set.
    """

    def paid(stage: str, index: int, prompt: str, choices: int, max_tokens: int) -> Reply:
        key = id, stage, index, digest(prompt)
        record = journal.reply(key)
        if record is None:
            if stop.is_set():
                raise Unavailable("stopped")
            most = len(prompt.encode()) + _OVERHEAD, choices * max_tokens
            meter.reserve(most)
            try:
                reply = ask(Request(f"{id}/{stage}/{index}", prompt, choices, max_tokens))
                names = dict(zip(("id", "stage", "index", "prompt"), key, strict=True))
                made_by = {"model": model, "version": prompts.PROMPT_VERSION}
                cost = meter.cost(reply.prompt_tokens, reply.completion_tokens)
                record = {"kind": "reply", **names, **reply._asdict(), "cost": cost, **made_by}
                meter.count(reply.prompt_tokens, reply.completion_tokens)
                journal.append(record)
            finally:
                meter.release(most)
        return Reply(*(record[field] for field in Reply._fields))

    return paid


def extract(
    row: dict[str, str],
    paid: Paid,
    *,
    expert_tries: int,
    candidates: int,
    choices: int,
    score_tries: int,
    max_expert_tokens: int,
    max_strategy_tokens: int,
    max_score_tokens: int,
) -> dict[str, Any]:
    """The verdict on one problem: its strategy, or why there is none (Sec. 3.1, App. B, C).

    Args:
      row: id, problem, answer, and the solution if there is one.
      paid: how to ask.
      expert_tries: responses asked for until one has the right answer, without a solution.
      candidates: K.
      choices: candidates asked for in one request.
      score_tries: scorings asked for until one can be read.
      max_expert_tokens, max_strategy_tokens, max_score_tokens: of one reply.

    Returns:
      A dict of strategy and score (None when nothing is kept), reason ("kept" or why not), detail, candidates (a list
      of strategy, reason, detail, score), and solution if the strong model wrote it.
    """
    verdict: dict[str, Any] = {"strategy": None, "score": None, "reason": "", "detail": "", "candidates": []}
    try:
        solution = row.get("solution")
        if solution is None:
            solution = _expert(row, paid, expert_tries, max_expert_tokens)
            if solution is None:
                return verdict | {"reason": "no_expert", "detail": f"none of {expert_tries} tries was right"}
            verdict["solution"] = solution
        # A long thought says no more about the way than the solution after it.
        shown = strategy_text.visible(solution) or solution
        checked = _candidates(row, shown, paid, candidates, choices, max_strategy_tokens)
        verdict["candidates"] = checked
        passed = [candidate for candidate in checked if not candidate["reason"]]
        if not passed:
            return verdict | {"reason": "no_candidate", "detail": f"all {len(checked)} rejected"}
        prompt = prompts.scoring(row["problem"], shown, [candidate["strategy"] for candidate in passed])
        values, why = _numbers(paid, "score", prompt, len(passed), score_tries, max_score_tokens)
    except TooLong as error:
        return verdict | {"reason": "prompt_too_long", "detail": str(error)}
    if values is None:
        return verdict | {"reason": "no_scores", "detail": why}
    for candidate, score in zip(passed, values, strict=True):
        candidate["score"] = score
    best = strategy_text.best([candidate["score"] for candidate in checked])
    assert best is not None  # `passed` is not empty
    chosen = checked[best]
    return verdict | {"strategy": chosen["strategy"], "score": chosen["score"], "reason": "kept"}


def _expert(row: dict[str, str], paid: Paid, tries: int, max_tokens: int) -> str | None:
    """The first response of the strong model that has the right answer and an end."""
    for index in range(tries):
        reply = paid("expert", index, prompts.expert(row["problem"]), 1, max_tokens)
        (verdict,) = rewards.score(reply.texts[:1], [row["answer"]])
        if reply.finish[0] == "stop" and verdict.outcome == "correct":
            return reply.texts[0]
    return None


def _candidates(
    row: dict[str, str], solution: str, paid: Paid, count: int, choices: int, max_tokens: int
) -> list[dict[str, Any]]:
    """All candidates, each with its strategy or the reason of its rejection."""
    checked: list[dict[str, Any]] = []
    prompt = prompts.extraction(row["problem"], solution)
    while len(checked) < count:
        reply = paid("strategy", len(checked), prompt, min(choices, count - len(checked)), max_tokens)
        for text, finish in zip(reply.texts, reply.finish, strict=True):
            strategy, reason, detail = strategy_text.parse(text, finish)
            if strategy is not None:
                reason, detail = leakage.find(strategy, row["problem"], row["answer"], solution)
                if not reason and any(strategy == other["strategy"] for other in checked):
                    reason, detail = "duplicate", ""
            checked.append({"strategy": strategy, "reason": reason, "detail": detail, "score": None})
    return checked


def rate(row: dict[str, str], paid: Paid, *, tries: int, max_tokens: int) -> dict[str, Any]:
    """A judge's ratings of a kept strategy by the four criteria, and their mean; None when it gives none (App. H)."""
    solution = strategy_text.visible(row["solution"]) or row["solution"]
    try:
        prompt = prompts.audit(row["problem"], solution, row["strategy"])
        ratings, why = _numbers(paid, "audit", prompt, len(prompts.CRITERIA), tries, max_tokens)
    except TooLong as error:
        return {"ratings": None, "mean": None, "reason": str(error)}
    if ratings is None:
        return {"ratings": None, "mean": None, "reason": why}
    return {"ratings": ratings, "mean": sum(ratings) / len(ratings), "reason": ""}


def _numbers(
    paid: Paid, stage: str, prompt: str, count: int, tries: int, max_tokens: int
) -> tuple[list[float] | None, str]:
    """The first readable list of `count` numbers, or what was wrong with the last."""
    why = ""
    for index in range(tries):
        reply = paid(stage, index, prompt, 1, max_tokens)
        values, why = strategy_text.scores(reply.texts[0], count, reply.finish[0])
        if values is not None:
            return values, ""
    return None, why


def work_through(
    rows: Sequence[dict[str, str]],
    work: Callable[[dict[str, str]], str],
    *,
    concurrency: int,
    max_failures: int,
    stop: threading.Event,
    done: Callable[[str], None],
) -> str:
    """Runs `work` on every row in threads; requests under way when it stops are finished first.

    Args:
      rows: problems.
      work: row -> reason of its verdict.
      concurrency: rows worked on at once.
      max_failures: rows in a row left open by requests that fail, which end it.
      stop: set when it ends early; `work` heeds it before each request, and waiting for a retry ends.
      done: called after each row with the reason, or with "left_open".

    Returns:
      Why it ended early, or "".
    """

    def guarded(row: dict[str, str]) -> str | None:
        if stop.is_set():
            return None
        try:
            return work(row)
        except (Denied, BudgetReached):
            stop.set()  # here, so that no other thread starts anything more
            raise

    why, failures = "", 0
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(guarded, row) for row in rows]
        try:
            for future in as_completed(futures):
                try:
                    reason = future.result()
                except (Denied, BudgetReached) as error:
                    why = why or str(error)
                except (Refused, Unavailable) as error:
                    done("left_open")
                    failures += 1
                    if failures >= max_failures and not stop.is_set():
                        why = f"{failures} problems in a row could not be finished, the last because of {error}"
                        stop.set()
                else:
                    failures = 0
                    if reason is not None:
                        done(reason)
        except KeyboardInterrupt:
            why = "interrupted"
        finally:
            stop.set()
    return why
