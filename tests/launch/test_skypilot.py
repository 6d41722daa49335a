"""The task for SkyPilot: its fields, and the commands that its texts run."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers.launching import ROOT, bench

from sgpo_jax.cli import COMMANDS, parsing

TASK = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}  # as release 0.14.1 reads them


def test_the_task_has_the_fields_that_skypilot_reads():
    assert set(TASK) == FIELDS
    assert set(TASK["resources"]) == {"accelerators", "use_spot", "disk_size", "job_recovery"}
    stopped = int(re.search(r"^    status=(\d+)$", (ROOT / "launch/preemptible.sh").read_text(), re.M)[1])
    recovery = TASK["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [stopped] and set(recovery) == {
        "max_restarts_on_errors", "recover_on_exit_codes",
    }  # fmt: skip
    assert [name for name, value in TASK["envs"].items() if value is None] == ["WORKDIR"], "must be given"


# The client pins many packages, so it gets an environment of its own.
CLIENT = """
import json, sys, sky
task = sky.Task.from_yaml_config(json.load(sys.stdin), env_overrides=[("WORKDIR", "gs://my-bucket/run")])
print(json.dumps([task.num_nodes, task.envs["WORKDIR"]]))
"""


@pytest.mark.slow
def test_the_client_takes_the_task(tmp_path):
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    alone = [uv, "run", "--no-project", "--isolated", "--python", sys.executable, "--with", "skypilot==0.14.1"]
    done = subprocess.run(
        [*alone, "python", "-c", CLIENT], input=json.dumps(TASK), capture_output=True, text=True, timeout=300,
        cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    nodes, workdir = json.loads(done.stdout.splitlines()[-1])
    assert (nodes, workdir) == (1, "gs://my-bucket/run")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_its_texts_install_and_run_what_is_there(tmp_path):
    here = bench(tmp_path)
    result = here.bash("-c", f"cd '{here.tree}'\n{TASK['setup']}")
    assert result.returncode == 0, result.stderr
    installed = ["python3", "-m", "uv", "pip", "install", "--quiet", "--python", ".venv"]
    assert [*installed, "--editable", ".[gpu,buckets]"] in here.recorded()
    python = here.tree / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    given = {**TASK["envs"], "WORKDIR": "gs://my-bucket/run", "ARGUMENTS": "--config.rl.steps=5 --config.seed=1"}
    result = here.bash("-c", f"cd '{here.tree}'\n{TASK['run']}", **nodes, **given)
    assert result.returncode == 0, result.stderr
    module, name, *words = result.stdout.splitlines()
    assert (module, name) == ("-m", "sgpo_jax.main")
    words = [word.replace("configs/", f"{ROOT}/configs/") for word in words]
    config, flags = parsing.parse(COMMANDS["train"], words)
    assert (flags.coordinator, flags.processes, flags.process) == ("10.0.0.1:8476", 2, 1)
    assert flags.workdir == "gs://my-bucket/run" and (config.rl.steps, config.seed) == (5, 1)


def test_its_texts_are_sound(tmp_path):
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    for name in ("setup", "run"):
        script = tmp_path / f"{name}.sh"
        script.write_text("#!/bin/bash\n" + TASK[name])
        result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
        assert result.stdout == ""
