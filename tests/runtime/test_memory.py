"""Memory is given back after long compilations, and nothing happens where it cannot be."""

import ctypes
from types import SimpleNamespace

import jax
import pytest
from helpers.folders import config_of

from sgpo_jax.commands import train
from sgpo_jax.runtime import memory


@pytest.fixture
def compile_something(monkeypatch):
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)

    def compile_it(seconds):
        for listen in listeners:
            listen("/jax/core/compile/backend_compile_duration", seconds, fun_name="update")
            listen("/jax/core/compile/jaxpr_trace_duration", seconds)

    return compile_it


def test_a_long_compilation_is_followed_by_one_trim(monkeypatch, compile_something):
    trims = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trims.append))
    memory.trim_after_compiling()
    compile_something(0.9)
    assert trims == []
    compile_something(1.0)
    assert trims == [0]


@pytest.mark.parametrize("error", [OSError("no such library"), None])
def test_another_c_library_has_nothing_to_call(monkeypatch, compile_something, error):
    def load(name):
        if error:
            raise error
        return SimpleNamespace()

    monkeypatch.setattr(ctypes, "CDLL", load)
    memory.trim_after_compiling()
    compile_something(5.0)


def test_the_command_asks_for_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(memory, "trim_after_compiling", lambda: asked.append("trim"))
    monkeypatch.setattr(train.preemption, "watch", lambda grace: None)
    monkeypatch.setattr(train, "run", lambda config, workdir: asked.append("run"))
    one_process = dict.fromkeys(("coordinator", "processes", "process"))
    train.main(config_of("quickstart.py"), SimpleNamespace(workdir=str(tmp_path), distributed=False, **one_process))
    assert asked == ["trim", "run"]


def test_the_compiler_says_how_long_it_took():
    seen = {}
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: seen.setdefault(event, seconds))
    jax.jit(lambda x: x * 3 + 1)(2.0)
    assert seen["/jax/core/compile/backend_compile_duration"] > 0
