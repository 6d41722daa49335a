"""The frame of the SFT and the RL loop: start or resume, write, show, evaluate, save, go back, stop."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
from ml_collections import ConfigDict

from sgpo_jax.policy import Run
from sgpo_jax.report import page
from sgpo_jax.runtime import compilation, is_first, preemption
from sgpo_jax.runtime.metric_writer import Writer
from sgpo_jax.runtime.profile import Profile
from sgpo_jax.sharding import ROWS, axis_ways
from sgpo_jax.training import collapse, rollback, skipped_batch, stage
from sgpo_jax.training.optimizer import updates_taken
from sgpo_jax.training.state import TrainState

# (parameters, finished steps) -> (score that tells the best checkpoint, metrics)
Evaluate = Callable[[Any, int], tuple[float, dict[str, float]]]


class Clock:
    """Seconds of the phases of one step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}  # phase -> seconds of all its laps, in order

    def lap(self, phase: str) -> None:
        """Ends a phase, which began with the clock or with the end of the phase before."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Returns the seconds of all phases."""
        return self._last - self._start


class Loop:
    """The steps of one stage; a context manager.

        with Loop(run, "rl", total) as loop:
            state = loop.start(initial)
            for step in loop.steps():
                ...
                state = loop.finish(state, metrics, rows, batch)

    Checkpoints and metrics go to the folder of the run. A run that is killed resumes after its last checkpoint.

    Args:
      run: the config, the folder, the model and its mesh.
      name: of the stage, "sft" or "rl".
      total: steps of the whole stage.
      evaluate: measures the parameters after every `evaluate_every` steps and after the last one; None never does.
      evaluate_every: 0 never evaluates.
      updates: optimizer steps in each step.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        total: int,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 0,
        updates: int = 1,
    ):
        self._run, self._name, self._total = run, name, total
        self._evaluate, self._evaluate_every = evaluate, evaluate_every
        self.optimizer, self._rate = stage.optimizer(run.config, name, total * updates)
        self.teaching = stage.teaching(run.config, name)
        _, self.shardings = stage.state_shardings(run.policy, self.optimizer, run.mesh, self.teaching)
        self.forward = stage.forward(run)
        self._profile = Profile(run.config.profile, run.workdir / name / "profile")
        self._began: tuple[float, float] | None = None  # clock and compiling time before the first step
        self._show = page.live(run.workdir, run.config.report_seconds * is_first(), name.upper(), total)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._saved = stack.enter_context(stage.checkpoints_of(self._run, self._name))
            stack.enter_context(jax.set_mesh(self._run.mesh))
            self._writing = stack.enter_context(contextlib.ExitStack())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.close()
        self._stack.__exit__(*exception)

    def start(self, initial: Callable[[], Any]) -> TrainState:
        """Returns the state of the latest checkpoint, or the first state, with the parameters of `initial()`."""
        preemption.check()  # also before the first step, which compiles for a while
        run = self._run
        state = stage.start(self._saved, initial, run.policy, self.optimizer, run.mesh, self.teaching)
        self._initial = initial
        self.base = stage.base(run)
        self.first = self._done = int(state.step)
        self._taken = updates_taken(state.opt_state)
        workdir, limits = run.workdir, run.config.monitor
        self._rollbacks = rollback.read(workdir) if self._name == "rl" else []
        rows = rollback.rows_up_to(workdir, self._done) if self._name == "rl" else []
        self._watch = collapse.Watch(limits, rows) if self._name == "rl" else None
        if self._done < self._total:
            writer = Writer(
                workdir, self._total, self._name, resume_step=self._done, enabled=is_first(), trackers=run.trackers
            )
            self._writer = self._writing.enter_context(writer)
        return state

    def weights(self, state: TrainState) -> Any:
        """Returns the parameters to sample with and to evaluate; adapters are merged into their base."""
        return stage.weights(self._run, state.params)

    def steps(self) -> Iterator[int]:
        """Yields the number of finished steps before each step that is left; after a rollback it goes down."""
        if self._done < self._total:
            print(f"{self._name}: compiling the first step", flush=True)
            compilation.watch()
            self._began = time.perf_counter(), compilation.seconds()
        while self._done < self._total:
            with self._profile.step(self._name, self._done + 1):
                yield self._done
            self._profile.end(self._done)

    def position(self, step: int) -> int:
        """Returns the place of a step among the batches and in the noise: its number, plus the steps taken back."""
        return step + rollback.passed(self._rollbacks)

    def finish(self, state: TrainState, metrics: dict[str, float], rows: Sequence[dict], batch: Any) -> TrainState:
        """Ends a step: writes its metrics, evaluates, saves, and acts on a collapse, a skipped update or SIGTERM.

        Args:
          state: after the step.
          metrics: name -> number, with "skipped" and "rows_filled".
          rows, batch: what the update read, in host memory; kept on disk if it was skipped.

        Returns:
          The state to continue with: `state`, or that of an earlier checkpoint after a rollback.

        Raises:
          FloatingPointError: too many updates in a row were skipped, or a collapse stops the run.
          Preempted: SIGTERM has come, and the state is saved.
        """
        config, done = self._run.config, self._done + 1
        skipped_batch.handle(self._run, self._name, done, int(metrics["skipped"]), rows, batch)
        if done == self.first + 1:
            advise_packing(self._run, self._name, metrics["rows_filled"])
            if self._name == "rl":
                advise_responses(self._run.config.rl, done, metrics)
        if self._began:
            seconds = time.perf_counter() - self._began[0], compilation.seconds() - self._began[1]
            print("{}: first step done after {:.0f} s, of which {:.0f} s compiling".format(self._name, *seconds))
            self._began = None
        # The rate of the step's first update. Skipped updates do not move the optimizer's own count.
        metrics["learning_rate"] = float(self._rate(self._taken))
        self._taken = updates_taken(state.opt_state)
        score, last = None, done == self._total
        if self._evaluate and self._evaluate_every and (done % self._evaluate_every == 0 or last):
            score, measured = self._evaluate(self.weights(state), done)
            metrics |= measured
        self._writer.write(done, metrics)
        collapsed = self._watch(metrics) if self._watch else ""
        if collapsed and self._goes_back(done, collapsed):
            self._writing.close()
            preemption.check()
            jax.tree.map(lambda x: x.delete(), state)  # makes room for the one that is restored
            return self.start(self._initial)
        preempted = preemption.requested()
        if score is not None or done % config.checkpoint.every == 0 or last or preempted or collapsed:
            self._writer.sync()
            self._saved.save(done, state, score)
        preemption.stop(preempted, f"saved at step {done}")
        if collapsed:
            after = f" after {len(self._rollbacks)} rollbacks" * bool(self._rollbacks)
            raise FloatingPointError(f"step {done}: {collapsed}; stopped{after}, as monitor.action asks")
        self._done = done
        self._show(done)
        return state

    def _goes_back(self, done: int, sign: str) -> bool:
        """Takes the run on disk back to before a collapse, if the config asks for that; returns whether it has."""
        limits = self._run.config.monitor
        if limits.action != "rollback" or len(self._rollbacks) >= limits.most_rollbacks:
            return False
        return rollback.go_back(self._run.workdir, self._saved, limits, self._run.config.checkpoint.every, done, sign)


def advise_responses(rl: ConfigDict, step: int, metrics: dict[str, float]) -> None:
    """Prints which field to change where no response of a step could earn a reward.

    Args:
      rl: the section of the config.
      step: its number.
      metrics: with "truncated" and "no_box".
    """
    if metrics["truncated"] == 1:
        print(
            f"RL step {step}: cut 100 %: all responses reached rl.max_new_tokens={rl.max_new_tokens} and got reward 0; "
            f"raise it, as in --config.rl.max_new_tokens={4 * rl.max_new_tokens}",
            flush=True,
        )
    elif metrics["no_box"] == 1 and not rl.reward:
        print(
            f"RL step {step}: no response has a \\boxed{{}} answer, so all got reward 0; data.instruction asks for the "
            "box, solutions with a box teach it in the warm-up, and rl.reward names a reward of your own",
            flush=True,
        )


def advise_packing(run: Run, name: str, filled: float) -> None:
    """Prints how to compute less when many rows of an update are empty.

    Args:
      run, name: the run and its stage.
      filled: share of the computed rows that hold responses.
    """
    rows = run.config[name].micro_batch
    if filled < 0.75 and rows > axis_ways(run.mesh, ROWS):
        print(
            f"{name}.micro_batch={rows}: {filled:.0%} of the rows that an update computes hold responses; "
            "a smaller one leaves fewer empty",
            flush=True,
        )
