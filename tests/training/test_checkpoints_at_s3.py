"""Checkpoints at s3://: those that one process sends as files, and those that several processes write together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers.bucket_servers import amazon
from orbax.checkpoint._src.serialization import tensorstore_utils

from sgpo_jax.runtime import buckets, lock, mirror, s3_arrays
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.state import TrainState

URL = "s3://bucket/run"
BUILD = tensorstore_utils.build_kvstore_tspec


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(tensorstore_utils, "build_kvstore_tspec", BUILD)
    monkeypatch.setattr(s3_arrays, "_places", {})
    monkeypatch.setitem(buckets.PERIODS, "s3", buckets.Periods(send=30, apart=0, beat=0.1, lease=1.0, look=0.1))
    with amazon() as server:
        yield server
    mirror._mirrors.clear()


def share(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        mirror.share(folder)


def state(value):
    return TrainState(jnp.int32(value), {"kernel": value + jnp.arange(100.0)}, (), jnp.int32(0))


def resumed(monkeypatch, shared, step):
    """Restores the last checkpoint of the run, saves one after `step`, and returns (steps, the state) before that."""
    mirror._mirrors.clear()  # as on another machine
    folder = mirror.copy(URL)
    if shared:
        share(folder, monkeypatch)
    with lock.hold(folder):
        place = mirror.arrays(folder / "rl/checkpoints")
        assert str(place).startswith(URL) == shared
        with Checkpoints(place, keep=9, best="score", higher_is_better=True, seed=0) as saved:
            before = saved.all_steps(), saved.restore_latest(state(0))
            saved.save(step, state(step))
    return before


def names(step):
    return {name for name in buckets.listing(f"{URL}/rl/checkpoints") if name.partition("/")[0] == str(step)}


def test_one_process_goes_on_where_several_stopped_and_the_other_way(server, monkeypatch):
    """Also where those that were killed had no time for the checksums, or for all of a checkpoint."""
    assert resumed(monkeypatch, False, 1) == ([], None)
    buckets.write(f"{URL}/rl/checkpoints/7/state/manifest.ocdbt", b"of a process that was killed")
    for shared, step in ((True, 2), (True, 3), (False, 4), (True, 5)):
        steps, last = resumed(monkeypatch, shared, step)
        assert steps == list(range(1, step))
        np.testing.assert_array_equal(last.params["kernel"], state(step - 1).params["kernel"])
        buckets.delete(f"{URL}/rl/checkpoints/{step}.files.json")
    assert not names(7), "a run of one process deletes it"


def test_another_release_of_orbax_is_refused_by_name(server, monkeypatch):
    folder = mirror.copy(URL)
    known = {"driver": "gcs", "bucket": "bucket", "path": "run/a"}
    there = {"driver": "gcs", "url": "gs://bucket/run/a"}

    def another(directory, name="", use_ocdbt=True):
        return {"base": there} if use_ocdbt else there

    for other in (another, lambda place: {"base": known}, lambda directory, **more: {}):
        monkeypatch.setattr(tensorstore_utils, "build_kvstore_tspec", other)
        message = rf"^--workdir={URL}: orbax-checkpoint [\d.]+ names the place of an array in another way than 0\.12\.8"
        with pytest.raises(ValueError, match=message):
            share(folder, monkeypatch)
        assert not mirror._of(folder).direct and tensorstore_utils.build_kvstore_tspec is other


def test_a_bucket_that_tensorstore_cannot_write_to_is_refused_before_the_run(server, monkeypatch):
    server.fails[:] = [("PUT .*probe", 403)]
    with pytest.raises(ValueError, match=f"^--workdir={URL}: must be in a bucket that TensorStore can write to, .*403"):
        share(mirror.copy(URL), monkeypatch)


@pytest.mark.slow
def test_the_files_of_orbax_outlive_an_outage(server):
    buckets.write(f"{URL}/config.json", b"{}")
    server.fails[:] = [("HEAD .*config", 503)] * 5
    assert epath.Path(f"{URL}/config.json").is_file() and not server.fails


def test_the_place_of_a_bucket(server, monkeypatch):
    keys = {"aws_credentials": {"type": "environment"}}
    there = {"driver": "s3", "bucket": "bucket", "aws_region": "us-east-1"}
    assert s3_arrays._place("bucket") == there | keys | {"endpoint": server.url}
    monkeypatch.setattr(s3_arrays, "_AMAZON", re.compile(re.escape(server.url)))
    far = {"LocationConstraint": "eu-west-1"}
    buckets.client("s3").call_s3("create_bucket", Bucket="far", CreateBucketConfiguration=far)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    assert s3_arrays._place("far") == there | {"bucket": "far", "aws_region": "eu-west-1"}


@pytest.mark.parametrize(
    ("url", "theirs"),
    [
        ("https://s3.amazonaws.com", True), ("https://s3.eu-west-1.amazonaws.com", True),
        ("https://s3.hf.co/me", False), ("https://vpce-1.s3.us-east-1.vpce.amazonaws.com", False),
    ],
)  # fmt: skip
def test_the_servers_of_amazon_itself(url, theirs):
    assert bool(s3_arrays._AMAZON.fullmatch(url)) == theirs
