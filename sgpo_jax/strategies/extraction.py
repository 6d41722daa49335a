"""Extracts the strategy of one problem, and rates one strategy.

`extract` and `rate` send their requests through `paid`, which looks for the reply in the journal first. So a killed
extraction resumes by calling the function again from the start.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from sgpo_jax import rewards
from sgpo_jax.strategies import leakage, parsing, prompts
from sgpo_jax.strategies.budget import Paid
from sgpo_jax.strategies.faults import TooLong


@dataclass(frozen=True)
class Limits:
    """Limits on the number and length of the replies that an extraction requests for a problem."""

    expert_tries: int  # responses to a problem without a solution, until one has the right answer
    candidates: int  # K, candidate strategies
    choices: int  # candidates of one request
    score_tries: int  # requests for scores, until they can be parsed
    max_expert_tokens: int  # tokens of a solution
    max_strategy_tokens: int  # tokens of a candidate
    max_score_tokens: int  # tokens of a reply with scores or ratings

    @classmethod
    def from_config(cls, fields: ConfigDict) -> "Limits":
        """Reads the section `extract` of a config."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


def extract(row: dict[str, str], paid: Paid, limits: Limits) -> dict[str, Any]:
    """Returns the verdict on one problem: its strategy, or why there is none (Sec. 3.1, App. B, C).

    Args:
      row: id, problem, answer, and the solution if there is one.
      paid: sends a request, or finds its reply in the journal.
      limits: number and length of the replies.

    Returns:
      A dict of strategy and score (None if no candidate is kept), reason ("kept", or why no candidate is), detail,
      candidates (a list of dicts of strategy, reason, detail and score), and solution if the strong model wrote it.
    """
    verdict: dict[str, Any] = {"strategy": None, "score": None, "reason": "", "detail": "", "candidates": []}
    try:
        solution = row.get("solution")
        if solution is None:
            solution, why = _expert(row, paid, limits)
            if solution is None:
                return verdict | {"reason": "no_expert", "detail": why}
            verdict["solution"] = solution
        # The solution after a long thought has all that a strategy needs.
        shown = parsing.visible(solution) or solution
        checked = _candidates(row, shown, paid, limits)
        verdict["candidates"] = checked
        passed = [candidate for candidate in checked if not candidate["reason"]]
        if not passed:
            return verdict | {"reason": "no_candidate", "detail": f"all {len(checked)} rejected"}
        prompt = prompts.scoring(row["problem"], shown, [candidate["strategy"] for candidate in passed])
        values, why = _numbers(paid, "score", prompt, len(passed), limits.score_tries, limits.max_score_tokens)
    except TooLong as error:
        return verdict | {"reason": "prompt_too_long", "detail": str(error)}
    if values is None:
        return verdict | {"reason": "no_scores", "detail": why}
    for candidate, score in zip(passed, values, strict=True):
        candidate["score"] = score
    best = parsing.best([candidate["score"] for candidate in checked])
    assert best is not None  # `passed` is not empty
    winner = checked[best]
    return verdict | {"strategy": winner["strategy"], "score": winner["score"], "reason": "kept"}


def _expert(row: dict[str, str], paid: Paid, limits: Limits) -> tuple[str | None, str]:
    """Returns (the strong model's first response that has the right answer and is not cut, or None; why)."""
    ends: Counter[str] = Counter()
    for index in range(limits.expert_tries):
        reply = paid("expert", index, prompts.expert(row["problem"]), 1, limits.max_expert_tokens)
        (verdict,) = rewards.score(reply.texts[:1], [row["answer"]])
        if reply.finish[0] == "stop" and verdict.outcome == "correct":
            return reply.texts[0], ""
        ends[reply.finish[0]] += 1
    why = f"none of {limits.expert_tries} tries was right"
    others = [f"{count} {end}" for end, count in ends.items() if end not in ("stop", "length")]
    return None, why + (f" ({', '.join(others)})" if others else "")


def _candidates(row: dict[str, str], solution: str, paid: Paid, limits: Limits) -> list[dict[str, Any]]:
    """Returns all candidates, each with its strategy or the reason for its rejection."""
    checked: list[dict[str, Any]] = []
    prompt = prompts.extraction(row["problem"], solution)
    while len(checked) < limits.candidates:
        choices = min(limits.choices, limits.candidates - len(checked))
        reply = paid("strategy", len(checked), prompt, choices, limits.max_strategy_tokens)
        for text, finish in zip(reply.texts, reply.finish, strict=True):
            strategy, reason, detail = parsing.parse(text, finish)
            if strategy is not None:
                reason, detail = leakage.find(strategy, row["problem"], row["answer"], solution)
                if not reason and any(strategy == other["strategy"] for other in checked):
                    reason, detail = "duplicate", ""
            checked.append({"strategy": strategy, "reason": reason, "detail": detail, "score": None})
    return checked


def rate(row: dict[str, str], paid: Paid, *, tries: int, max_tokens: int) -> dict[str, Any]:
    """Returns a judge's ratings of a kept strategy (App. H).

    Args:
      row: problem, solution, strategy.
      paid: sends a request, or finds its reply in the journal.
      tries: requests until the ratings can be parsed.
      max_tokens: tokens of a reply.

    Returns:
      A dict of ratings (by the four criteria), their mean (both None if no reply can be parsed), and reason.
    """
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
    """Returns (the first list of `count` numbers that can be parsed, or None; what is wrong with the last reply)."""
    why = ""
    for index in range(tries):
        reply = paid(stage, index, prompt, 1, max_tokens)
        values, why = parsing.scores(reply.texts[0], count, reply.finish[0])
        if values is not None:
            return values, ""
    return None, why
