"""The trace of some steps: it holds them and no others, and the phases by their names."""

import gzip
import json

import jax.numpy as jnp

from sgpo_jax.runtime.profile import Profile, phase


def test_the_trace_has_the_steps_and_the_phases(tmp_path, capsys):
    rollout = phase("rollout")(lambda x: {"sum": jnp.sum(x)})
    profile = Profile((2, 3), tmp_path / "profile")
    for number in range(1, 5):
        with profile.step("rl", number):
            assert float(rollout(jnp.ones(number))["sum"]) == number
        profile.end(number)
        assert (tmp_path / "profile").exists() == (number >= 3)
    assert capsys.readouterr().out.count("profile: ") == 1
    (path,) = (tmp_path / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("rollout") == 2
    steps = [int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {})]
    assert sorted(set(steps)) == [2, 3]


def test_no_steps_no_trace(tmp_path):
    profile = Profile((), tmp_path / "profile")
    with profile.step("rl", 1):
        pass
    profile.end(1)
    profile.close()
    assert not (tmp_path / "profile").exists()
