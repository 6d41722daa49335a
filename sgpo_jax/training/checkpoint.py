"""Checkpoints of a stage: the whole TrainState and the seed of the run, written by Orbax.

Kept are the last few and the best. A save is atomic, so a kill in the middle leaves the one before; checksums tell
when a checkpoint is no longer what was saved.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from sgpo_jax.runtime import checksums, distributed
from sgpo_jax.training.state import TrainState

FORMAT = 1  # of what is saved; another one is refused
# Most bytes of an array that are written, and have to be read, as one. By default that is what one device holds of it:
# where many devices restore what one has saved, each would read the whole.
_PIECE = 2**24


class Damaged(ValueError):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """The checkpoints of one folder; a context manager that waits for the last save.

    Args:
      folder: made when absent.
      keep: how many of the latest to keep; the best is kept besides.
      best: name of the metric, given to `save`, that tells which one is best.
      higher_is_better: whether the best is the highest or the lowest.
      seed: of the run. With the step it fixes the data position and all noise, so a run goes on only under the seed of
        its checkpoint.
      stop_on_error: whether a checkpoint that cannot be saved (a full disk) stops the run; else it is said and the run
        goes on, with the last one that could. With several processes it stops: the others would wait for the one that
        failed.
      reading: of a folder in which a run may be going on: nothing is written or renamed. Otherwise damaged checkpoints
        are set aside, and finished ones get their checksums.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        best: str,
        higher_is_better: bool,
        seed: int,
        stop_on_error: bool = True,
        reading: bool = False,
    ):
        self._folder = Path(folder).absolute()
        self._stop_on_error = stop_on_error or jax.process_count() > 1
        self._reading = reading
        if not reading:
            self._set_aside_damaged()
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
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=lambda metrics: metrics[best],
            single_host_load_and_broadcast=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except ValueError as error:  # it reads the metrics of all of them
            raise Damaged(f"a checkpoint in {self._folder} is damaged: {_short(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        return sorted(map(int, self._manager.all_steps()))  # numpy's, where the first process has told the others

    def best_step(self) -> int | None:
        """Step of the best checkpoint, the earliest on a tie; the latest when none carries the metric."""
        return distributed.first(self._best_step)

    def _best_step(self) -> int | None:
        scores = {step: score for step in self.all_steps() if (score := self._score(step)) is not None}
        if not scores:
            return self.latest_step()
        return (max if self._higher_is_better else min)(scores, key=lambda step: scores[step])

    def _score(self, step: int) -> float | None:
        metrics = self._manager.metrics(step)
        return None if metrics is None else metrics.get(self._best)

    def save(self, step: int, state: TrainState, score: float | None = None) -> None:
        """Saves the state after `step`; `score` is its value of the metric that tells the best one.

        Raises:
          OSError: this or an earlier save failed, and `stop_on_error` is set.
        """
        self.wait()
        run = {"format": FORMAT, "seed": self._seed}
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), state)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state, pieces), run=ocp.args.JsonSave(run))
        metrics = None if score is None else {self._best: float(score)}
        try:
            self._manager.save(step, args=args, metrics=metrics)
        except Exception as error:
            self._failed(error)

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the last one first."""
        self.wait()
        for later in reversed(self.all_steps()):
            if later > step:
                self._manager.delete(later)
        self.wait()

    def wait(self) -> None:
        """Returns when every save has been written, with its checksums.

        Raises:
          OSError: one failed, and `stop_on_error` is set.
        """
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0 and not self._reading:
                for step in self._manager.all_steps():
                    if not checksums.is_written(self._folder / str(step)):
                        checksums.write(self._folder / str(step))
                checksums.forget_missing(self._folder)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        last = self.latest_step()
        kept = "there is none yet" if last is None else f"the last good one is {self._folder / str(last)}"
        message = f"a checkpoint could not be saved ({_short(error)}); {kept}"
        if self._stop_on_error:
            raise OSError(message) from error
        print(f"warning: {message}; the run goes on", flush=True)

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state saved after `step`, placed as `state` (arrays or ShapeDtypeStructs with shardings).

        Raises:
          Damaged: files are missing or not what was saved.
          ValueError: it is of another format, model or optimizer.
        """
        return self._restore(step, jax.tree.map(ocp.utils.to_shape_dtype_struct, state))

    def restore_params(self, step: int, state: TrainState) -> Any:
        """The parameters of that state alone; the optimizer's, twice their size, is not read. Raises as `restore`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        skipped = jax.tree.map(lambda _: ocp.PLACEHOLDER, target.opt_state)
        return self._restore(step, target.replace(opt_state=skipped)).params

    def _restore(self, step: int, target: TrainState) -> TrainState:
        path = self._folder / str(step)
        if found := distributed.first(lambda: checksums.damage(path, quick=False)):
            raise Damaged(f"checkpoint {path} is damaged: {found}")
        saved = self._run(step).get("format")
        if saved != FORMAT:
            raise ValueError(f"checkpoint {path} has format {saved!r}; this version reads {FORMAT}")
        placed = ocp.checkpoint_utils.construct_restore_args(target)
        return self._read(step, state=ocp.args.PyTreeRestore(target, restore_args=placed))["state"]

    def restore_latest(self, state: TrainState) -> TrainState | None:
        """The newest state that is whole, or None where nothing was saved. Damaged ones are set aside, and named.

        Raises:
          ValueError: it is of another seed, format, model or optimizer; or all there is is damaged.
        """
        while (step := self.latest_step()) is not None:
            self._check_seed(step)
            try:
                return self.restore(step, state)
            except Damaged:
                self._set_aside_damaged(quick=False)
                self._manager.reload()
        if damaged := distributed.first(lambda: sorted(map(str, self._folder.glob("*.damaged")))):
            raise ValueError(f"no checkpoint is left but {', '.join(damaged)}; remove it to begin anew")
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
            message = f"checkpoint {path} is of another model or optimizer than the config's, or damaged"
            raise ValueError(f"{message}: {_short(error)}") from error

    def _set_aside_damaged(self, quick: bool = True) -> None:
        def look():
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if path.name.isdigit() and (found := checksums.damage(path, quick)):
                    aside = checksums.set_aside(path)
                    print(f"warning: checkpoint {path} is damaged: {found}; it is now {aside.name}", flush=True)

        distributed.first(look)  # the others go on when it is done


def _short(error: Exception) -> str:
    """Both ends of a message, which may be pages: what went wrong tends to stand in one of them."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
