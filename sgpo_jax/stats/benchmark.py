"""Statistics of graded samples: avg@k, pass@k, maj@k, and bootstrap intervals over problems.

Axis key: M problems, K samples of each.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

# What a response is conditioned on: the problem alone, or a strategy and the problem. The names are those in the files
# and tables of an evaluation; CONTEXTS[guided] is the name of one.
CONTEXTS = ("unguided", "guided")
RESAMPLES = 2000  # bootstrap resamples


def contexts(guided: bool) -> tuple[str, ...]:
    """Returns the contexts of an evaluation: both where it is also `guided`, else "unguided" alone."""
    return CONTEXTS if guided else CONTEXTS[:1]


def bootstrap_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the means `[RESAMPLES]` of per-problem values `[M]`, each over M problems drawn with replacement."""
    count = len(values)
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES) @ values / count


def interval(means: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval (low, high) of bootstrapped means."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval (low, high) of the mean of per-problem values `[M]`, by resampling problems."""
    return interval(bootstrap_means(values, seed))


def gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Returns (mean, low, high) of `after` minus `before`, per-problem values `[M]`: a 95 % interval over problems."""
    differences = np.subtract(after, before)
    return float(differences.mean()), *bootstrap(differences)


def pass_at(correct: int, samples: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k, the probability that one of k samples is correct.

        1 - C(n - c, k) / C(n, k)

    Args:
      correct: c, number of correct samples.
      samples: n, number of samples.
      k: from 1 to n.

    Raises:
      ValueError: c or k is not between its limits.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(
            f"correct={correct}, samples={samples}, k={k}: must be 0 <= correct <= samples, 1 <= k <= samples"
        )
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def winner(votes: Sequence[int]) -> int | None:
    """Returns the index of the first sample with the majority answer; None when no sample votes.

    Args:
      votes: `[K]` class of each sample's answer, -1 for no vote. On a tie the class with the earliest vote wins.
    """
    counts = Counter(vote for vote in votes if vote >= 0)  # keeps the order of the first vote
    return None if not counts else list(votes).index(max(counts, key=lambda vote: counts[vote]))


def powers_of_two(samples: int) -> list[int]:
    """Returns 1, 2, 4, ... below the number of samples, then that number."""
    return [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]


def per_problem(rewards: np.ndarray, votes: np.ndarray) -> dict[str, np.ndarray]:
    """Returns values `[M]` for each problem: accuracy, and pass@k and maj@k for k = 1, 2, 4, ..., K.

    Args:
      rewards: `[M,K]` from 0 to 1; 1 is correct.
      votes: `[M,K]` as in `winner`; maj@k is over the first k samples.
    """
    samples = rewards.shape[1]
    correct = (rewards >= 1).sum(axis=1)
    values = {"accuracy": rewards.mean(axis=1)}
    for k in powers_of_two(samples):
        values[f"pass@{k}"] = np.array([pass_at(int(c), samples, k) for c in correct])
    for k in powers_of_two(samples):
        elected = [winner(row[:k]) for row in votes.tolist()]
        values[f"maj@{k}"] = np.array([0.0 if j is None else row[j] for j, row in zip(elected, rewards, strict=True)])
    return values
