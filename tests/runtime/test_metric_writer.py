"""The JSONL file of a run, its TensorBoard scalars, its progress line and its tables."""

import json
import math
import os
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sgpo_jax.runtime import files, metric_writer, progress, tables, tracker_clients
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.runtime.progress import progress_line
from sgpo_jax.runtime.trackers import Trackers


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars_of(folder, texts=False):
    """Returns (tag, step, value) of every scalar, or text, in a folder of TensorBoard event files."""
    found = []
    for path in sorted(folder.iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (size,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + size])
            for v in event.summary.value:
                kind = v.metadata.plugin_data.plugin_name
                value = v.tensor.string_val[0].decode() if kind == "text" else v.simple_value
                found += [(v.tag.removesuffix("/text_summary"), event.step, value)] * ((kind == "text") == texts)
            start += 16 + size
    return found


def test_one_row_a_step_in_the_order_given(tmp_path):
    with metric_writer.Writer(tmp_path / "run", total_steps=2, name="rl") as writer:
        writer.write(1, {"reward": np.float32(0.5), "alpha": jnp.asarray(0.25), "skipped": 3})
        assert rows_of(tmp_path / "run/rl.jsonl") == [
            {"step": 1, "reward": 0.5, "alpha": 0.25, "skipped": 3}
        ]  # on disk before the run ends
        writer.write(2, {"reward": 1.0, "alpha": 0.0, "skipped": 3})
    lines = (tmp_path / "run/rl.jsonl").read_text().splitlines()
    assert lines[1] == '{"step": 2, "reward": 1.0, "alpha": 0.0, "skipped": 3}'


def test_every_line_is_strict_json(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": jnp.float32(-jnp.inf), "d": 1.5}
    with metric_writer.Writer(tmp_path, total_steps=1, name="rl") as writer:
        writer.write(1, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "rl.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 1.5}


def test_scalars_reach_the_disk_during_the_run(tmp_path, monkeypatch):
    """TensorBoard's writer would keep those of two minutes, which a kill loses for good."""
    assert tracker_clients._FLUSH <= 10
    monkeypatch.setattr(tracker_clients, "_FLUSH", 0.05)
    with (
        Trackers(["tensorboard"], tmp_path) as trackers,
        metric_writer.Writer(tmp_path, total_steps=3, name="sft", trackers=trackers) as writer,
    ):
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25})
        deadline = time.monotonic() + 30
        events = tmp_path / "tensorboard/sft"
        while not events.exists() or scalars_of(events) != [("sft/loss", 1, 0.5), ("sft/loss", 2, 0.25)]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_rows_are_on_disk_before_a_checkpoint(tmp_path, monkeypatch):
    synced = []
    with metric_writer.Writer(tmp_path, total_steps=3, name="sft") as writer:
        writer.write(1, {"loss": 0.5})
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
        writer.sync()
    assert str(tmp_path / "sft.jsonl") in synced  # TensorBoard's thread does so too, with its own file
    metric_writer.Writer(tmp_path, total_steps=3, name="rl", enabled=False).sync()


def test_tensorboard_scalars(tmp_path):
    with (
        Trackers(["tensorboard"], tmp_path) as trackers,
        metric_writer.Writer(tmp_path, total_steps=3, name="sft", trackers=trackers) as writer,
    ):
        writer.write(1, {"loss": 0.5, "bad": math.nan})
        writer.write(3, {"loss": 0.25})
    scalars = scalars_of(tmp_path / "tensorboard/sft")
    assert scalars == [("sft/loss", 1, 0.5), ("sft/loss", 3, 0.25)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft.jsonl", "tensorboard"]


def test_tensorboard_has_the_config_and_tables_as_text(tmp_path):
    with Trackers(["tensorboard"], tmp_path, {"rl": {"delta": 1.0}}) as trackers:
        trackers.begin("rl", 4)
        trackers.table("rl/generations/heldout", 7, [{"id": 1, "response": "a | b\n<c>"}, {"id": 2, "response": ""}])
    assert scalars_of(tmp_path / "tensorboard/rl", texts=True) == [
        ("config", 5, '    {\n     "rl": {\n      "delta": 1.0\n     }\n    }'),
        ("rl/generations/heldout", 7,
         "| id | response |\n| --- | --- |\n| 1 | a &#124; b<br>&lt;c&gt; |\n| 2 |  |"),
    ]  # fmt: skip


def test_a_resumed_run_has_each_step_once(tmp_path):
    with metric_writer.Writer(tmp_path, total_steps=5, name="rl") as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.1 * step})
    path = tmp_path / "rl.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 4, "lo')  # killed in the middle of a line

    with metric_writer.Writer(tmp_path, total_steps=5, name="rl", resume_step=2) as writer:
        assert path.read_text() == "".join(before.splitlines(keepends=True)[:2])
        for step in (3, 4, 5):
            writer.write(step, {"loss": float(step)})
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4, 5]
    assert rows_of(path)[2]["loss"] == 3.0
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["rl.jsonl"]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    (tmp_path / "rl.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with metric_writer.Writer(tmp_path, total_steps=5, name="rl"):
        assert (tmp_path / "rl.jsonl").read_text() == ""


def test_a_crash_while_dropping_rows_loses_nothing(tmp_path, monkeypatch):
    text = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "rl.jsonl").write_text(text)

    def crash(*paths):
        raise OSError("power cut")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        metric_writer.Writer(tmp_path, total_steps=5, name="rl", resume_step=1).__enter__()
    assert (tmp_path / "rl.jsonl").read_text() == text


def test_other_processes_write_nothing(tmp_path, capsys):
    with metric_writer.Writer(tmp_path / "run", total_steps=1, name="rl", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_impossible_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"resume_step must be in 0\.\.5, not 6"):
        metric_writer.Writer(tmp_path, total_steps=5, name="rl", resume_step=6)
    with pytest.raises(ValueError, match="total_steps must be at least 0, not -1"):
        metric_writer.Writer(tmp_path, total_steps=-1, name="rl")
    with metric_writer.Writer(tmp_path, total_steps=5, name="rl", resume_step=2) as writer:
        for step in (2, 6):
            with pytest.raises(ValueError, match=rf"step must be in 3\.\.5, not {step}"):
                writer.write(step, {})
        with pytest.raises(ValueError, match="must not contain 'step'"):
            writer.write(3, {"step": 3})
    assert rows_of(tmp_path / "rl.jsonl") == []


def test_plain_output_is_a_line_every_few_seconds(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with metric_writer.Writer(tmp_path, total_steps=22, name="rl") as writer:
        for step in range(1, 23):
            now += 1.0
            writer.write(step, {"loss": 1.0 / step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].split("/")[0] for line in lines] == ["0", "5", "10", "15", "20", "22"]
    assert lines[1] == "rl 5/22  ETA 0:00:17  loss 0.2000"


def test_time_left_follows_the_recent_steps(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with metric_writer.Writer(tmp_path, total_steps=100, name="rl") as writer:
        for step in range(1, 61):
            now += 100.0 if step <= 30 else 10.0
            writer.write(step, {})
    assert capsys.readouterr().out.splitlines()[-1] == "rl 60/100  ETA 0:06:40"


def test_progress_line_leaves_out_what_has_no_place():
    line = progress_line(
        "rl", 3, 40, {"kl_clip_share": 0.1, "reward_auto": 0.25, "loss": -0.5}, 3700.2
    )
    assert line == "rl 3/40  ETA 1:01:40  loss -0.5000  auto 0.250"


def test_read_jsonl_ignores_only_a_half_written_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "é"}\n{"a": ', encoding="utf-8")
    assert read_jsonl(path) == [{"a": 1}, {"a": "é"}]
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON"):
        read_jsonl(path)
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not a JSON object"):
        read_jsonl(path)


def test_table_prints_what_it_returns(capsys):
    text = tables.table("Accuracy", ["", "before"], [["unguided", "[0.1]"], ["[bold]guided", 0.25]])
    assert capsys.readouterr().out == text + "\n"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert [c for c in cells if c] == [["unguided", "[0.1]"], ["[bold]guided", "0.25"]]
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        tables.table("Accuracy", ["", "before"], [["unguided"]])


def test_a_table_in_a_notebook_is_text_as_elsewhere(capsys, monkeypatch):
    """Rich would draw into the notebook by itself, and return nothing."""
    text = tables.table("Accuracy", ["", "before"], [["unguided", 0.25]])
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert tables.table("Accuracy", ["", "before"], [["unguided", 0.25]]) == text
    assert "0.25" in tables.fitting("Accuracy", ["", "before"], [["unguided", "0.25"]], 12)
