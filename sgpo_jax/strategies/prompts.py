"""The prompts that ask a strong model or the student for a solution, a strategy, scores or ratings."""

from collections.abc import Sequence

from sgpo_jax.policy.prompts import user_turn

# Version of the prompts below. It is stored with every reply, and an extraction resumes only with the same version.
PROMPT_VERSION = "1"


def expert(problem: str) -> str:
    """Returns the prompt for a whole solution, for a problem whose data has none."""
    return (
        f"Problem:\n{problem}\n\n"
        "Solve this problem. Write the solution so that a student can follow it: every step and the reason for it, "
        "checked where a check is easy. End with the final answer in \\boxed{}, once."
    )


def extraction(problem: str, solution: str) -> str:
    """Returns the prompt for the strategy behind a solution (App. B)."""
    return (
        "Below are a problem and a correct solution. Distil the strategy behind the solution: advice that would help "
        "somebody to solve this problem and others of its kind, without doing any of the work for them.\n\n"
        f"Problem:\n{problem}\n\n"
        f"Solution:\n{solution}\n\n"
        "The strategy has exactly three parts:\n"
        "1. Problem type: which kind of problem this is, as specifically as possible, in a few words.\n"
        "2. Strategy: the one principle, theorem or technique that the solution rests on.\n"
        "3. Steps: what to do, in order, in two to six short steps with letters. Say what to determine in each step, "
        "never what comes out of it.\n\n"
        "Keep it short and general. It must contain neither the final answer nor any value that the solution "
        "calculates; speak of quantities by name. Write in English, without formatting.\n\n"
        "Reply with these three lines and nothing else:\n"
        "Problem type: ...\n"
        "Strategy: ...\n"
        "Steps: (a) ... (b) ... (c) ..."
    )


def own_strategy(problem: str, solution: str, bare: bool = False) -> str:
    """Returns the prompt that asks the student for the strategy behind its own solution.

    Args:
      problem: the problem.
      solution: the student's solution.
      bare: leave out the instructions. The model of the embedded world has learnt what follows such a prompt.
    """
    if bare:
        return user_turn(f"{problem}\n\n{solution}\n\nStrategy:", instruction="")
    return extraction(problem, solution)


def scoring(problem: str, solution: str, candidates: Sequence[str]) -> str:
    """Returns the prompt for one score per candidate strategy (App. C)."""
    shown = "\n\n".join(f"Candidate {i}:\n{text}" for i, text in enumerate(candidates, start=1))
    form = ", ".join(f"s{i}" for i in range(1, len(candidates) + 1))
    return (
        f"Below are a problem, a correct solution, and candidates ({len(candidates)}) for the strategy behind the "
        "solution: advice to somebody who has yet to solve it.\n\n"
        f"Problem:\n{problem}\n\n"
        f"Solution:\n{solution}\n\n"
        f"{shown}\n\n"
        f"Judge every candidate by four questions:\n{_CRITERIA}\n\n"
        "Give each candidate one number from 0 (useless) to 1 (perfect) for all four together; use the whole range "
        "and tell the better from the worse. Think it over briefly if you like, and end with this line, one number "
        "per candidate, in their order:\n"
        f"Score: [{form}]"
    )


def audit(problem: str, solution: str, strategy: str) -> str:
    """Returns the prompt that asks a judge for one rating of a kept strategy per criterion (App. H)."""
    return (
        "Below are a problem, a correct solution, and a strategy: advice to somebody who has yet to solve the problem. "
        "Rate the strategy strictly.\n\n"
        f"Problem:\n{problem}\n\n"
        f"Solution:\n{solution}\n\n"
        f"Strategy to rate:\n{strategy}\n\n"
        f"Answer four questions, each by a number from 0 (not at all) to 1 (fully):\n{_CRITERIA}\n\n"
        "End with this line, the four numbers in the order of the questions:\n"
        "Ratings: [r1, r2, r3, r4]"
    )


CRITERIA = ("problem type", "strategy", "steps", "no results")  # short names, in the order of the questions
_CRITERIA = (
    "1. Problem type: is it right, and specific rather than a label that fits anything?\n"
    "2. Strategy: does it name a fitting and specific technique, one that is not obvious from the problem alone?\n"
    "3. Steps: are they at the right level, concrete enough to follow and general enough for similar problems?\n"
    "4. No results: is it free of intermediate calculations and of the answer?"
)
