"""A profile of some steps of a run: a trace by JAX's profiler, in which the phases of a step have their names."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])

_tracing = False


def phase(name: str) -> Callable[[F], F]:
    """Returns a decorator that gives the calls of a function a name in the trace.

    While a trace is written, a call lasts until its arrays are there, so that the phases have their true lengths.
    """

    def named(function: F) -> F:
        @functools.wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            with jax.profiler.TraceAnnotation(name):
                result = function(*arguments, **more)
                return jax.block_until_ready(result) if _tracing else result

        return call  # type: ignore[return-value]

    return named


class Profile:
    """The trace of the steps of one stage.

    Args:
      steps: (first, last), counted from 1; () is none.
      folder: for the trace.
    """

    def __init__(self, steps: tuple[int, ...], folder: Path):
        self._first, self._last = steps or (0, -1)
        self._folder = folder

    def step(self, name: str, number: int) -> jax.profiler.StepTraceAnnotation:
        """Returns a context manager for one step; the trace begins with the first one that it is to hold."""
        global _tracing
        if self._first <= number <= self._last and not _tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python's would bury the phases
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            _tracing = True
        return jax.profiler.StepTraceAnnotation(name, step_num=number)

    def end(self, number: int) -> None:
        """Writes the trace after its last step, and says where it is."""
        if number >= self._last:
            self.close()

    def close(self) -> None:
        """Writes the trace, if there is one."""
        global _tracing
        if _tracing:
            _tracing = False
            jax.profiler.stop_trace()
            print(f"profile: {self._folder}; docs/benchmarks.md says how to look at it", flush=True)
