"""Checkpoints of a stage: the whole TrainState and the seed of the run, written by Orbax.

Kept are the last few and the best. A save is atomic, so a kill in the middle leaves the one before.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from sgpo_jax.train_step import TrainState


class Checkpoints:
    """The checkpoints of one folder; a context manager that waits for the last save.

    Args:
      folder: made when absent.
      keep: how many of the latest to keep; the best is kept besides.
      best: name of the metric, given to `save`, that tells which one is best.
      higher_is_better: whether the best is the highest or the lowest.
      seed: of the run. With the step it fixes the data position and all noise, so a run goes on only under the seed of
        its checkpoint.
    """

    def __init__(self, folder: str | Path, keep: int, best: str, higher_is_better: bool, seed: int):
        self._best = best
        self._seed = seed
        self._higher_is_better = higher_is_better
        kept = [
            policies.LatestN(keep),
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[best],
                reverse=not higher_is_better,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        # Without best_fn the manager would not write the metrics, and a resumed run would not know its best.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), best_fn=lambda metrics: metrics[best]
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Step of the best checkpoint, the earliest on a tie; the latest when none carries the metric."""
        steps = self._manager.all_steps()
        scores = {step: score for step in sorted(steps) if (score := self._score(step)) is not None}
        if not scores:
            return self.latest_step()
        return (max if self._higher_is_better else min)(scores, key=lambda step: scores[step])

    def _score(self, step: int) -> float | None:
        metrics = self._manager.metrics(step)
        return None if metrics is None else metrics.get(self._best)

    def save(self, step: int, state: TrainState, score: float | None = None) -> None:
        """Saves the state after `step`; `score` is its value of the metric that tells the best one."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave({"seed": self._seed}))
        self._manager.save(step, args=args, metrics=None if score is None else {self._best: float(score)})

    def wait(self) -> None:
        """Returns when every save has been written."""
        self._manager.wait_until_finished()

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state saved after `step`, placed as `state` (arrays or ShapeDtypeStructs with shardings).

        Raises:
          ValueError: the checkpoint is damaged, or of another model.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._read(step, state=ocp.args.StandardRestore(target))["state"]

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            path, why = self._manager.directory / str(step), str(error)[:500]
            raise ValueError(f"checkpoint {path}: it is damaged, or of another model ({why})") from error

    def check_seed(self, step: int) -> None:
        """Raises ValueError unless the state after `step` was saved under this run's seed."""
        seed = self._read(step, run=ocp.args.JsonRestore())["run"]["seed"]
        if seed != self._seed:
            raise ValueError(f"seed={self._seed}: the checkpoint {self._manager.directory / str(step)} has {seed}")
