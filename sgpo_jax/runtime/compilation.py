"""The time that XLA has spent compiling in this process, so that a run can say what its first step takes."""

import functools

import jax

_seconds: list[float] = []


@functools.cache
def watch() -> None:
    """Counts the compilations from the first call on."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            _seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)


def seconds() -> float:
    """Returns the seconds of all compilations since `watch`."""
    return sum(_seconds)
