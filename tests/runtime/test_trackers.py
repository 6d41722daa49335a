"""Trackers: what each of the real clients stores offline, read with its own tools; and that none costs a step."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from helpers import runs
from helpers.paths import ROOT

from sgpo_jax import config as configs
from sgpo_jax import config_checks
from sgpo_jax.runtime import tracker_clients, trackers
from sgpo_jax.runtime.trackers import Trackers

CONFIG = {"seed": 3, "rl": {"delta": 1.0, "teacher": "live"}, "stages": ["sft", "rl"], "profile": []}
ROWS = [
    {"step": 2, "id": "a", "response": "x\n|é", "reward": 1.0},
    {"step": 2, "id": "b", "response": "", "reward": 0.0},
]


class Recorder(tracker_clients.Client):
    """Notes its calls in a list that the test has; waits or fails where the test says so."""

    def __init__(self, run):
        self.calls = RECORDED
        self.calls.append(("open", run.id, run.name, dict(run.config)))

    def begin(self, stage, after):
        self.calls.append(("begin", stage, after))

    def log(self, stage, step, values):
        if step in FAILS:
            raise FAILS[step]
        BUSY.set()
        WAIT.wait()
        self.calls.append(("log", stage, step, dict(values)))

    def table(self, name, step, rows):
        self.calls.append(("table", name, step, list(rows)))

    def file(self, path):
        self.calls.append(("file", path.name))

    def close(self, failed):
        self.calls.append(("close", failed))


RECORDED: list = []
FAILS: dict = {}
WAIT, BUSY = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    global RECORDED
    RECORDED = []  # a tracker that stood still in an earlier test may still write to its own
    FAILS.clear()
    WAIT.set()
    monkeypatch.setitem(tracker_clients.CLIENTS, "wandb", Recorder)
    yield
    WAIT.set()


def test_every_name_that_a_config_may_have_has_a_client():
    assert set(configs.TRACKERS) == set(tracker_clients.CLIENTS) == set(tracker_clients.PACKAGES)
    assert configs.base().trackers == ("tensorboard",)


def test_calls_arrive_in_order_and_without_what_is_not_finite(tmp_path):
    (tmp_path / "report.html").write_text("page")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * trackers.ROWS))
    with Trackers(["wandb"], tmp_path / "run", CONFIG) as writer:
        writer.begin("rl", 4)
        writer.log("rl", 5, {"loss": 0.5, "bad": float("nan"), "worse": float("inf")})
        writer.table("eval/accuracy", 0, [])
        writer.lines("rl/generations/heldout", 5, tmp_path / "rows.jsonl")
        writer.file(tmp_path / "report.html")
        writer.file(tmp_path / "nothing.html")
    id = json.loads((tmp_path / "run" / trackers.FILE).read_text())["id"]
    table = ("table", "rl/generations/heldout", 5, (ROWS * trackers.ROWS)[: trackers.ROWS])
    assert RECORDED == [
        ("open", id, "run", CONFIG), ("begin", "rl", 4), ("log", "rl", 5, {"loss": 0.5}), table,
        ("file", "report.html"), ("close", False),
    ]  # fmt: skip


def test_the_same_run_is_found_again_and_another_folder_is_another_run(tmp_path):
    for name in ("a", "a", "b"):
        with Trackers(["wandb"], tmp_path / name, CONFIG):
            pass
    first, again, other = (call[1] for call in RECORDED if call[0] == "open")
    assert first == again != other


def test_a_run_that_fails_says_so_to_its_trackers(tmp_path):
    with pytest.raises(FloatingPointError), Trackers(["wandb"], tmp_path, CONFIG):
        raise FloatingPointError
    assert RECORDED[-1] == ("close", True)


@pytest.mark.parametrize("error", [OSError("no space left on\ndevice"), SystemExit(1), KeyboardInterrupt()])
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, capsys, error):
    FAILS[2] = error
    with Trackers(["wandb", "tensorboard"], tmp_path, CONFIG) as writer:
        writer.begin("rl", 0)
        for step in (1, 2, 3):
            writer.log("rl", step, {"loss": 1.0})
    assert [call[2] for call in RECORDED if call[0] == "log"] == [1]
    assert list((tmp_path / "tensorboard/rl").iterdir()), "the other one goes on"
    message = " ".join(f"{type(error).__name__}: {error}".split())
    assert capsys.readouterr().out == f"warning: wandb: {message}; the run goes on without it\n"


def test_a_tracker_that_cannot_begin_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tracker_clients.CLIENTS, "wandb", lambda run: 1 / 0)
    with Trackers(["wandb"], tmp_path, CONFIG) as writer:
        writer.log("rl", 1, {"loss": 1.0})
    assert capsys.readouterr().out.startswith("warning: wandb: ZeroDivisionError")


def test_a_tracker_that_stands_still_costs_no_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "_WAITING", 20)
    monkeypatch.setattr(trackers, "_PATIENCE", 0.2)
    WAIT.clear()
    started = time.monotonic()
    with Trackers(["wandb"], tmp_path, CONFIG) as writer:
        for step in range(1, 5):
            writer.log("rl", step, {"loss": 1.0})
    assert time.monotonic() - started < 5
    assert capsys.readouterr().out == "warning: wandb: has not finished in time; the run goes on without it\n"
    BUSY.clear()
    with Trackers(["wandb"], tmp_path, CONFIG) as writer:
        writer.log("rl", 1, {"loss": 1.0})
        BUSY.wait(10)
        for step in range(2, 100):
            writer.log("rl", step, {"loss": 1.0})
    assert capsys.readouterr().out == "warning: wandb: 20 calls wait for it; the run goes on without it\n"


def test_without_trackers_nothing_happens(tmp_path):
    with Trackers((), tmp_path / "run") as writer:
        writer.log("rl", 1, {"loss": 1.0})
        writer.lines("name", 1, tmp_path / "nothing.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_other_processes_have_no_trackers(tmp_path, monkeypatch):
    config = configs.base()
    config.trackers = ("wandb",)
    monkeypatch.setattr(trackers, "is_first", lambda: False)
    with Trackers.from_config(config, tmp_path / "run") as writer:
        writer.log("rl", 1, {"loss": 1.0})
    assert RECORDED == [] and list(tmp_path.iterdir()) == []


def test_wrong_names_and_missing_packages_are_refused(monkeypatch):
    config = configs.base()
    for wrong in (("wandb", "nix"), ("mlflow", "mlflow"), (3,)):
        config.trackers = wrong
        with pytest.raises(ValueError, match=r"^config\.trackers=.*: must be names from \('tensorboard', 'wandb'"):
            config_checks.check(config)
    trackers.check(("tensorboard",))
    monkeypatch.setitem(tracker_clients.PACKAGES, "trackio", "no_such_package")
    with pytest.raises(ValueError, match=r"^config\.trackers=\('trackio',\): .*without no_such_package: pip install"):
        trackers.check(("trackio",))


# ---- the real clients


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason="needs the extra 'trackers'")


def two_starts(name, workdir, monkeypatch):
    """Writes steps 1 and 2, and then, as a run that is resumed, step 3; returns the run's id."""
    monkeypatch.setitem(tracker_clients.CLIENTS, "wandb", tracker_clients.WandB)
    (workdir / "report.html").write_text("<p>page</p>")
    with Trackers([name], workdir, CONFIG) as writer:
        writer.begin("rl", 0)
        for step in (1, 2):
            writer.log("rl", step, {"loss": 0.5 / step, "pass@4": 1.0})
        writer.table("rl/generations/heldout", 2, ROWS)
    if name == "wandb":
        time.sleep(1.1)  # W&B names the folder of a start by its second
    with Trackers([name], workdir, CONFIG | {"seed": 4}) as writer:
        writer.begin("rl", 2)
        writer.log("rl", 3, {"loss": 0.25, "pass@4": 0.5})
        writer.file(workdir / "report.html")
    return json.loads((workdir / trackers.FILE).read_text())["id"]


def wandb_records(path):
    """Yields the records of a run's file: frames in blocks of 32 KiB, in W&B's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, place, message = path.read_bytes(), 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7 or not data[place + 6]:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message = (message if kind in (3, 4) else b"") + data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record


@needs("wandb")
@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    importlib.import_module("wandb").teardown()  # else it has the settings of an earlier run
    id = two_starts("wandb", tmp_path, monkeypatch)
    assert "warning" not in (output := capsys.readouterr().out)
    assert output.count("wandb: `wandb sync ") == 2
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    starts = [list(wandb_records(folder / f"run-{id}.wandb")) for folder in folders]
    configs_seen, history, artifacts = [], [], []
    for record in (record for start in starts for record in start):
        if record.HasField("run"):
            assert (record.run.run_id, record.run.display_name, record.run.project) == (id, tmp_path.name, "sgpo_jax")
            configs_seen.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
        if record.HasField("history"):
            history.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        if record.HasField("artifact"):
            artifacts.append((record.artifact.type, record.artifact.name))
    assert [fields["seed"] for fields in configs_seen] == [3, 4] and configs_seen[0]["rl"] == CONFIG["rl"]
    points = [(row["rl/step"], row["rl/loss"], row["rl/pass@4"]) for row in history if "rl/loss" in row]
    assert points == [(1, 0.5, 1.0), (2, 0.25, 1.0), (3, 0.25, 0.5)]
    (table,) = folders[0].rglob("*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["step", "id", "response", "reward"],
        "data": [[2, "a", "x\n|é", 1.0], [2, "b", "", 0.0]],
    }
    assert ("report", f"report-{id}") in artifacts


@needs("wandb")
@pytest.mark.slow
def test_weights_and_biases_without_a_key_asks_nobody(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    importlib.import_module("wandb").teardown()  # else it has the settings of an earlier run
    monkeypatch.setitem(tracker_clients.CLIENTS, "wandb", tracker_clients.WandB)
    with Trackers(["wandb"], tmp_path, CONFIG) as writer:
        writer.log("rl", 1, {"loss": 1.0})
    assert "warning: wandb: PermissionError: no API key: run `wandb login`" in capsys.readouterr().out


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_in_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    id = two_starts("mlflow", tmp_path / "run", monkeypatch)
    assert "warning" not in capsys.readouterr().out
    import mlflow

    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("sgpo_jax").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["sgpo_jax.run"]) == ("run", "FINISHED", id)
    assert run.data.params == {name: str(value) for name, value in configs.flat(CONFIG).items()}
    for name, values in (("rl/loss", [0.5, 0.25, 0.25]), ("rl/pass_at_4", [1.0, 1.0, 0.5])):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [*enumerate(values, 1)]

    def artifact(name):
        return mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{name}")

    assert json.loads(artifact("config.json"))["seed"] == 4 and artifact("report.html") == "<p>page</p>"
    assert json.loads(artifact("rl/generations/heldout_000002.json")) == {
        "columns": ["step", "id", "response", "reward"], "data": [[2, "a", "x\n|é", 1.0], [2, "b", "", 0.0]],
    }  # fmt: skip


@needs("mlflow")
@pytest.mark.slow
def test_a_whole_run_in_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    steps = {"sft__steps": 2, "sft__validate_every": 2, "rl__steps": 2, "rl__eval_every": 2, "eval__limit": 3}
    output = runs.run(tmp_path / "run", trackers="('tensorboard', 'mlflow')", **steps)
    assert "warning" not in output and "mlflow: experiment sgpo_jax, run " in output
    import mlflow

    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("sgpo_jax").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["rl.delta"] == "1.0"
    for stage in ("sft", "rl"):
        history = client.get_metric_history(run.info.run_id, f"{stage}/loss")
        assert [point.value for point in history] == [row["loss"] for row in runs.rows(tmp_path / "run", stage)]
    accuracy = client.get_metric_history(run.info.run_id, "eval/heldout/guided/accuracy")
    assert [point.step for point in accuracy] == [0, 2], "before and after RL"

    def artifacts(folder=None):
        return {item.path for item in client.list_artifacts(run.info.run_id, folder)}

    assert {"config.json", "report.html"} <= artifacts()
    assert artifacts("rl/generations") == {"rl/generations/heldout_unguided_000002.json"}
    assert "eval/after/heldout_guided_000002.json" in artifacts("eval/after")
    assert "eval/accuracy_000000.json" in artifacts("eval")
    assert {path.name for path in (tmp_path / "run" / "tensorboard").iterdir()} == {"sft", "rl", "eval"}


@needs("trackio")
@pytest.mark.slow
def test_trackio_on_this_machine(tmp_path):
    """In a process of its own: Trackio reads its folder when it is imported."""
    (tmp_path / "run").mkdir()
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests" / "runtime")!r})
import pytest, test_trackers
with pytest.MonkeyPatch.context() as patch:
    print("id", test_trackers.two_starts("trackio", pathlib.Path("run"), patch))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def execute(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = execute(sys.executable, "-c", program)
    assert "warning" not in output
    name = f"run-{output.split()[-1]}"

    def get(*arguments):
        return json.loads(execute(sys.executable, "-m", "trackio.cli", *arguments, "--project=sgpo_jax", "--json"))

    assert get("list", "runs")["runs"] == [name]
    assert get("get", "run", f"--run={name}")["config"].items() >= {"rl.teacher": "live", "rl.delta": 1.0}.items()
    for metric, values in (("rl/loss", [0.5, 0.25, 0.25]), ("rl/pass@4", [1.0, 1.0, 0.5])):
        points = get("get", "metric", f"--run={name}", f"--metric={metric}")["values"]
        assert [(point["step"], point["value"]) for point in points] == [*enumerate(values, 1)]
    (table,) = get("get", "metric", f"--run={name}", "--metric=rl/generations/heldout")["values"]
    assert table["step"] == 2 and table["value"]["_value"] == ROWS
    (artifact,) = get("list", "artifacts")["artifacts"]
    assert (artifact["name"], artifact["size_bytes"]) == (f"report-{name}", 11)
