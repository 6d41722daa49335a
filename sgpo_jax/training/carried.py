"""Problems that a step does not wait for: their responses go on in the next one, which has another policy.

Problem number n is the (n % B)-th of batch n // B, and has the noise of that batch whatever the step. A step has B
problems and `extra` more in flight. It ends when B of them are complete, and trains on the B that began first. The
others go on. One that has gone on `rl.carry_most` times must be complete before the step ends. At most `extra` problems
go on, and those that are complete come first, so no token that is trained on is older than `rl.carry_most` steps.

Every step leaves a file in the run's folder with what goes on. A resumed run reads the one of the step before it.

Axis key: N problems in flight, B problems of a step, G responses of a group, T response tokens.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sgpo_jax.rollout import RUNNING, Begun, Rollout
from sgpo_jax.runtime import distributed, mirror
from sgpo_jax.runtime.files import replacing


class Flight(NamedTuple):
    """Problems in flight, and their responses so far."""

    numbers: np.ndarray  # [N]
    first: np.ndarray  # [N] position of the step that began each
    rollouts: dict[str, Rollout]  # group -> [N,G]
    positions: dict[str, np.ndarray]  # group -> [N,G,T] int32, of the step that sampled a token; else 0


def extra(rl: ConfigDict) -> int:
    """Returns the problems that a step has in flight beyond those that it trains on."""
    return round(rl.carry_over * rl.batch)


def take(tree: Any, places: np.ndarray) -> Any:
    """Returns the problems at these places of a `Flight`, or of the rollouts of groups."""
    return jax.tree.map(lambda x: x[places], tree)


def nothing(sizes: Mapping[str, int], length: int) -> Flight:
    """Returns a flight of no problems.

    Args:
      sizes: group -> G.
      length: T.
    """
    rollouts, positions = {}, {}
    for name, size in sizes.items():
        counts = np.zeros((0, size), np.int32)
        positions[name] = np.zeros((0, size, length), np.int32)
        rollouts[name] = Rollout(positions[name], np.zeros((0, size, length), np.float32), counts, counts)
    return Flight(np.zeros(0, np.int64), np.zeros(0, np.int64), rollouts, positions)


def begin(before: Flight, position: int, total: int, rl: ConfigDict, pad_id: int) -> Flight:
    """Returns the problems in flight of a step: those that go on, and new ones.

    The last steps begin only problems that one of them trains on.

    Args:
      before: what goes on.
      position: of the step.
      total: steps of the run.
      rl: the section of the config.
      pad_id: fills a response after its end.
    """
    start = position * rl.batch + len(before.numbers)  # all before are trained on, or go on
    end = min((position + 1) * rl.batch + extra(rl), total * rl.batch)
    new = np.arange(start, max(start, end))

    def grown(x, value=0):
        return np.concatenate([x, np.full((len(new), *x.shape[1:]), value, x.dtype)])

    rollouts = {
        name: Rollout(grown(old.tokens, pad_id), grown(old.logp), grown(old.lengths), grown(old.finish, RUNNING))
        for name, old in before.rollouts.items()
    }
    positions = {name: grown(old) for name, old in before.positions.items()}
    return Flight(np.concatenate([before.numbers, new]), grown(before.first, position), rollouts, positions)


def spread(flight: Flight, shards: int) -> Flight:
    """Deals the problems out to the shards of the rows, so that each has its share of those that go on."""
    return take(flight, np.arange(len(flight.numbers)).reshape(-1, shards).T.reshape(-1))


def rows_of(flight: Flight, batches: Any, batch: int) -> list[dict]:
    """Returns the row of each problem.

    Args:
      flight: the problems.
      batches: the rows of every batch.
      batch: B.
    """
    found = {number: batches[number] for number in {*(flight.numbers // batch).tolist()}}
    return [found[n // batch][n % batch] for n in flight.numbers.tolist()]


def begun(flight: Flight, position: int, rl: ConfigDict) -> Begun:
    """Returns what a rollout is told: the responses so far, and when it ends."""
    rollout = Rollout(*(np.concatenate(fields, axis=1) for fields in zip(*flight.rollouts.values(), strict=True)))
    return Begun(rollout, position - flight.first >= rl.carry_most, np.int32(rl.batch))


def in_line(flight: Flight, position: int, expected: np.ndarray | None, longest: int) -> np.ndarray:
    """Returns expected lengths `[N,C]` by which those that go on are taken first, the oldest before the others.

    Args:
      flight, position: the problems of a step.
      expected: `[N,C]` tokens of a response; None: not known.
      longest: T.
    """
    age = np.broadcast_to((position - flight.first)[:, None], (len(flight.first), len(flight.rollouts)))
    return np.where(age > 0, longest + age, 0 if expected is None else expected).astype(np.float32)


def end(
    flight: Flight, rollouts: Mapping[str, Rollout], position: int, batch: int
) -> tuple[np.ndarray, Flight, dict[str, float]]:
    """Divides the problems in flight at the end of a step.

    Args:
      flight: as they were when it began.
      rollouts: group -> responses `[N,G]` at its end.
      position: of the step.
      batch: B, of which so many are complete.

    Returns:
      (places of the problems to train on `[B]`; what goes on; metrics of the age of the tokens to train on).
    """
    positions = {
        name: np.where(_known(rollout) & ~_known(flight.rollouts[name]), np.int32(position), flight.positions[name])
        for name, rollout in rollouts.items()
    }
    after = Flight(flight.numbers, flight.first, dict(rollouts), positions)
    complete = np.all([(rollout.finish != RUNNING).all(axis=1) for rollout in rollouts.values()], axis=0)
    in_order = np.argsort(flight.numbers)
    trained = in_order[complete[in_order]][:batch]
    return trained, take(after, in_order[~np.isin(in_order, trained)]), staleness(take(after, trained), position)


def staleness(trained: Flight, position: int) -> dict[str, float]:
    """Returns the share of problems that earlier steps began, and mean and largest age of all tokens, in steps."""
    ages = np.concatenate([
        position - trained.positions[name][_known(rollout)] for name, rollout in trained.rollouts.items()
    ])
    return {
        "carried": float((trained.first < position).mean()),
        "token_age": float(ages.mean()),
        "token_age_max": float(ages.max()),
    }


def _known(rollout: Rollout) -> np.ndarray:
    """Returns `[N,G,T]`, where there is a token."""
    return np.arange(rollout.tokens.shape[2]) < rollout.lengths[..., None]


class Carried:
    """The problems that go on from step to step, on disk and in memory.

    Args:
      folder: for a file of each step.
      rl: the section of the config.
      sizes: sampled group -> G.
      total: steps of the run.
      pad_id: fills a response after its end.
      keep: number of steps whose files are kept.
    """

    def __init__(self, folder: Path, rl: ConfigDict, sizes: Mapping[str, int], total: int, pad_id: int, keep: int):
        self._folder, self._rl, self._sizes, self._total, self._pad_id = folder, rl, sizes, total, pad_id
        self._keep = keep
        self._last = -1, nothing(sizes, rl.max_new_tokens)  # position of a step, and what goes on after it

    def begin(self, position: int, shards: int) -> Flight:
        """Returns the problems in flight of a step, dealt out to the shards of the rows.

        Raises:
          ValueError: the file of the step before is missing or damaged.
        """
        number, before = self._last
        if number != position - 1:
            before = self._read(position - 1)
        return spread(begin(before, position, self._total, self._rl, self._pad_id), shards)

    def end(
        self, position: int, flight: Flight, rollouts: Mapping[str, Rollout]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Keeps what goes on after a step, and forgets the oldest step; returns as `end`, without what goes on."""
        trained, after, metrics = end(flight, rollouts, position, self._rl.batch)
        self._last = position, after
        if distributed.is_first():
            with replacing(self._file(position)) as unfinished:
                np.savez_compressed(unfinished, **_arrays(after))
            for file in self._folder.glob("*.npz"):
                if file.stem.isdigit() and int(file.stem) <= position - self._keep:
                    file.unlink()
        return trained, metrics

    def _file(self, position: int) -> Path:
        return self._folder / f"{position:08d}.npz"

    def _read(self, position: int) -> Flight:
        file = self._file(position)
        content = distributed.first_bytes(lambda: file.read_bytes() if file.is_file() else b"")
        try:
            if not content:
                raise ValueError("there is no such file")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return _flight(arrays, nothing(self._sizes, self._rl.max_new_tokens), self._pad_id)
        except Exception as error:  # damaged bytes raise many kinds
            raise ValueError(
                f"{mirror.shown(file)}: must hold the responses that go on after step {position + 1} ({error}); put it "
                f"back, or remove the checkpoint of step {position + 1}, so that the run resumes at one before it"
            ) from error


def _arrays(flight: Flight) -> dict[str, Any]:
    """Returns what a file holds: of the responses only the tokens that are there, one after the other."""
    arrays: dict[str, Any] = {"numbers": flight.numbers, "first": flight.first}
    for name, rollout in flight.rollouts.items():
        known = _known(rollout)
        ragged = (values[known] for values in (rollout.tokens, rollout.logp, flight.positions[name]))
        values = *ragged, rollout.lengths, rollout.finish
        arrays |= {f"{name}/{field}": value for field, value in zip(_FIELDS, values, strict=True)}
    return arrays


_FIELDS = "tokens", "logp", "positions", "lengths", "finish"


def _flight(arrays: Mapping[str, np.ndarray], empty: Flight, pad_id: int) -> Flight:
    """Returns the flight of these arrays; `empty` has the groups and the shapes."""
    numbers, rollouts, positions = arrays["numbers"], {}, {}
    for name, shape in empty.rollouts.items():
        tokens, logp, sampled, lengths, finish = (arrays[f"{name}/{field}"] for field in _FIELDS)
        full = len(numbers), *shape.tokens.shape[1:]
        known = np.arange(full[2]) < lengths.reshape(full[:2])[..., None]

        def padded(values, fill, full=full, known=known):
            whole = np.full(full, fill, values.dtype)
            whole[known] = values
            return whole

        rollouts[name] = Rollout(padded(tokens, pad_id), padded(logp, 0), lengths, finish)
        positions[name] = padded(sampled, 0)
    return Flight(numbers, arrays["first"], rollouts, positions)
