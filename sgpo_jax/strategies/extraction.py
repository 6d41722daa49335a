"""One problem's way to a strategy, and many problems at once: every reply is written down before it is used.

`extract` and `rate` are plain functions that ask their questions through `paid`. It looks for the reply in the journal
first, so running a function again from the start is how a killed extraction goes on.
"""

from typing import Any

from sgpo_jax import rewards
from sgpo_jax.strategies import leakage, parsing, prompts
from sgpo_jax.strategies.budget import Paid
from sgpo_jax.strategies.clients import TooLong


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
        shown = parsing.visible(solution) or solution
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
    best = parsing.best([candidate["score"] for candidate in checked])
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
            strategy, reason, detail = parsing.parse(text, finish)
            if strategy is not None:
                reason, detail = leakage.find(strategy, row["problem"], row["answer"], solution)
                if not reason and any(strategy == other["strategy"] for other in checked):
                    reason, detail = "duplicate", ""
            checked.append({"strategy": strategy, "reason": reason, "detail": detail, "score": None})
    return checked


def rate(row: dict[str, str], paid: Paid, *, tries: int, max_tokens: int) -> dict[str, Any]:
    """A judge's ratings of a kept strategy by the four criteria, and their mean; None when it gives none (App. H)."""
    solution = parsing.visible(row["solution"]) or row["solution"]
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
        values, why = parsing.scores(reply.texts[0], count, reply.finish[0])
        if values is not None:
            return values, ""
    return None, why

