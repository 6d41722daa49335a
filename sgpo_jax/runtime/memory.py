"""Gives memory freed by XLA compilation back to the operating system; on CPU the arrays of the run need it."""

import ctypes

import jax

LONG = 1.0  # seconds; shorter compilations leave little behind


def trim_after_compiling() -> None:
    """Calls malloc_trim after every long compilation from now on. Does nothing where the C library is not glibc."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration") and duration_secs >= LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
