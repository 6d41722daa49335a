"""Memory that the compiler leaves behind: on CPU it would stand beside all that is computed afterwards."""

import ctypes

import jax

LONG = 1.0  # seconds; shorter compilations leave little


def trim_after_compiling() -> None:
    """From now on gives what a compilation has freed back to the system, where the C library is glibc."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration") and duration_secs >= LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
