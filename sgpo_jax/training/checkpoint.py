"""Checkpoints of a stage: the whole TrainState and the seed of the run, written by Orbax.

The latest few and the best are kept. A save is atomic: a kill in the middle leaves the previous checkpoint. Checksums
show when a checkpoint differs from what was saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from sgpo_jax.runtime import buckets, checksums, distributed, mirror
from sgpo_jax.stats import is_score
from sgpo_jax.training import gathered
from sgpo_jax.training.state import TrainState

FORMAT = 1  # version of the checkpoint format; any other version is refused
# Largest piece of an array, in bytes, that is written and read as one. The default is a device's part of the array: if
# many devices restore what one device saved, each of them would read the whole array.
_PIECE = 2**24
# At s3:// Orbax's mark of success makes a checkpoint whole, as it does at gs:// by default.
_AT_S3 = ocp.options.AtomicityOptions(ocp.options.AtomicityMode.COMMIT_FILE)


class Damaged(ValueError):
    """The error that a checkpoint differs from what was saved."""


@dataclass
class _KeepBest(policies.PreservationPolicy):
    """Keeps the checkpoint with the best score, the latest if several tie; one without a score is never the best.

    Orbax's own `BestN` sorts the scores, and a sequence with a NaN in it has no order.
    """

    metric: str
    higher_is_better: bool

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint, in the order of their steps, whether it is the best one."""
        scores = [score_in(checkpoint.metrics, self.metric) for checkpoint in checkpoints]
        best = better(scores, self.higher_is_better)
        last = max((i for i, score in enumerate(scores) if score is not None and score == best), default=None)
        return [i == last for i in range(len(checkpoints))]


def score_in(metrics: Any, name: str) -> float | None:
    """Returns the score of this name in the metrics of a checkpoint; None if it is absent or not finite."""
    score = metrics.get(name) if isinstance(metrics, dict) else None
    return score if is_score(score) else None


def better(scores: Sequence[float | None], higher_is_better: bool) -> float | None:
    """Returns the best of the scores that are not None, or None if there is none."""
    return (max if higher_is_better else min)((score for score in scores if score is not None), default=None)


class Checkpoints:
    """The checkpoints of one folder; a context manager that waits for the last save.

    Args:
      folder: the folder, as `mirror.arrays` returns it; it is created if it does not exist.
      keep: number of latest checkpoints to keep; the best one is kept too.
      best: name of the metric by which the best checkpoint is chosen; `save` takes its value.
      higher_is_better: whether the best checkpoint has the highest or the lowest value.
      seed: seed of the run. With the step it fixes the data position and all noise, so a run resumes only with the
        seed of its checkpoint.
      stop_on_error: whether a checkpoint that cannot be saved (a full disk) stops the run. If not, a warning is printed
        and the run continues. With several processes the run always stops: the others would wait for the one that
        failed.
      base: fingerprint of the frozen parameters under the adapters in the states; "" without adapters. A state is
        restored only where it is the same.
      reading: only read, because a run may be using the folder: nothing is written or renamed. Otherwise damaged
        checkpoints are set aside, and finished ones get their checksums.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        best: str,
        higher_is_better: bool,
        seed: int,
        stop_on_error: bool = True,
        base: str = "",
        reading: bool = False,
    ):
        self._folder = folder if buckets.is_url(str(folder)) else Path(folder).absolute()
        self._stop_on_error = stop_on_error or jax.process_count() > 1
        self._reading = reading
        self._base = base
        if not reading:
            self._set_aside_damaged()
        self._best = best
        self._seed = seed
        self._higher_is_better = higher_is_better
        preserved = [
            policies.LatestN(keep),
            _KeepBest(best, higher_is_better),
        ]
        # Without best_fn the manager would not write the metrics, and a resumed run could not tell its best checkpoint.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserved),
            best_fn=lambda metrics: metrics[best],
            single_host_load_and_broadcast=True,
            atomicity_options=_AT_S3 if str(self._folder).startswith("s3://") else None,
        )
        make = gathered.Manager if mirror.is_of_first(folder) else ocp.CheckpointManager
        try:
            self._manager = make(self._folder, options=options)
        except ValueError as error:  # the manager reads the metrics of all checkpoints
            raise Damaged(f"a checkpoint in {self._folder} is damaged: {_short(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint, or None if there is none."""
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints in ascending order."""
        return distributed.first(self._steps)

    def _steps(self) -> list[int]:
        return sorted(map(int, self._manager.all_steps()))  # with several processes the manager returns numpy integers

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint, the earliest if several tie; the latest if none has a score."""
        return distributed.first(self._best_step)

    def _best_step(self) -> int | None:
        steps = self._steps()
        scores = [score_in(self._manager.metrics(step), self._best) for step in steps]
        best = better(scores, self._higher_is_better)
        return max(steps, default=None) if best is None else steps[scores.index(best)]

    def save(self, step: int, state: TrainState, score: float | None = None) -> None:
        """Saves the state after `step`; `score` is its value of the metric `best`.

        A score that is not finite is no score: the checkpoint is saved as one that was not evaluated.

        Raises:
          OSError: this or an earlier save failed, and `stop_on_error` is set.
        """
        self.wait()
        run = {"format": FORMAT, "seed": self._seed} | ({"base": self._base} if self._base else {})
        saved = _present(state)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), saved)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(saved, pieces), run=ocp.args.JsonSave(run))
        metrics = {self._best: float(score)} if is_score(score) else None
        if score is not None and metrics is None and distributed.is_first():
            print(f"warning: step {step}: {self._best} is {score}; its checkpoint cannot become the best", flush=True)
        try:
            self._manager.save(step, args=args, metrics=metrics)
        except Exception as error:
            self._failed(error)

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the latest one first."""
        self.wait()
        for later in reversed(self.all_steps()):
            if later > step:
                self._manager.delete(later)
        self.wait()

    def wait(self) -> None:
        """Waits until every save has been written, with its checksums, and sends a bucket all files of the run.

        The hub gets them later where it has just got others: see `mirror.push`.

        Raises:
          OSError: a save failed, and `stop_on_error` is set.
        """
        try:
            self._manager.wait_until_finished()
            if distributed.is_first() and not self._reading:
                for step in self._manager.all_steps():
                    if not checksums.is_written(self._folder / str(step)):
                        checksums.write(self._folder / str(step))
                checksums.forget_missing(self._folder)
                mirror.push()  # the rows up to the next checkpoint are in the bucket before it
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        last = max(self._steps(), default=None)  # the other processes may not have failed
        remaining = "there is none yet" if last is None else f"the last good one is {self._folder / str(last)}"
        message = f"a checkpoint could not be saved ({_short(error)}); {remaining}"
        if self._stop_on_error:
            raise OSError(message) from error
        print(f"warning: {message}; the run continues", flush=True)

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Restores the state saved after `step`, placed like `state` (arrays or ShapeDtypeStructs with shardings).

        Raises:
          Damaged: files are missing or differ from what was saved.
          ValueError: the checkpoint has another format, model or optimizer, or adapters of another base.
        """
        return self._restore(step, jax.tree.map(ocp.utils.to_shape_dtype_struct, state))

    def restore_params(self, step: int, state: TrainState) -> Any:
        """Restores only the parameters; the optimizer's state and the teacher are not read. Raises as `restore`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        opt_state, teacher = jax.tree.map(lambda _: ocp.PLACEHOLDER, (target.opt_state, target.teacher))
        return self._restore(step, target.replace(opt_state=opt_state, teacher=teacher)).params

    def _restore(self, step: int, target: TrainState) -> TrainState:
        path = self._folder / str(step)
        if damage := distributed.first(lambda: checksums.damage(path, quick=False)):
            raise Damaged(f"checkpoint {path} is damaged: {damage}")
        run = self._run(step)
        if run.get("format") != FORMAT:
            raise ValueError(f"checkpoint {path} has format {run.get('format')!r}; this version reads {FORMAT}")
        if self._base and run.get("base") != self._base:
            raise ValueError(
                f"checkpoint {path} has adapters of a model with the fingerprint {run.get('base')!r}; that of "
                f"config.model.source is {self._base!r}, so its weights have changed"
            )
        wanted = _present(target)
        placed = ocp.checkpoint_utils.construct_restore_args(wanted)
        return target.replace(**self._read(step, state=ocp.args.PyTreeRestore(wanted, restore_args=placed))["state"])

    def restore_latest(self, state: TrainState) -> TrainState | None:
        """Restores the latest state that is not damaged, or returns None if nothing was saved.

        Damaged checkpoints are set aside, with a warning.

        Raises:
          ValueError: the checkpoint has another seed, format, model or optimizer; or all checkpoints are damaged.
        """
        while (step := self.latest_step()) is not None:
            self._check_seed(step)
            try:
                return self.restore(step, state)
            except Damaged:
                self._set_aside_damaged(quick=False)
                self._manager.reload()
        if damaged := distributed.first(lambda: sorted(map(str, self._folder.glob("*.damaged")))):
            raise ValueError(f"all checkpoints are damaged: {', '.join(damaged)}; remove them to start again")
        return None

    def _check_seed(self, step: int) -> None:
        seed = self._run(step).get("seed")
        if seed != self._seed:
            raise ValueError(f"seed={self._seed}: the checkpoint {self._folder / str(step)} has {seed}")

    def _run(self, step: int) -> dict:
        return self._read(step, run=ocp.args.JsonRestore())["run"]

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            path = self._folder / str(step)
            message = f"checkpoint {path} has another model or optimizer than the config, or is damaged"
            raise ValueError(f"{message}: {_short(error)}") from error

    def _set_aside_damaged(self, quick: bool = True) -> None:
        def check_all():
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if path.name.isdigit() and (damage := checksums.damage(path, quick)):
                    aside = checksums.set_aside(path)
                    print(f"warning: checkpoint {path} is damaged: {damage}; renamed to {aside.name}", flush=True)

        distributed.first(check_all)  # the other processes wait until it has finished


def _present(state: TrainState) -> dict[str, Any]:
    """Returns the fields of a state, without a teacher that is not there: earlier versions had none to save."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _short(error: Exception) -> str:
    """Shortens a message, which may be pages long, to both its ends, one of which usually names the cause."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
