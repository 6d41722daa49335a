"""The launch scripts, run dry or against a gcloud that runs the remote commands here."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "tpu_vm.sh"
WHERE = ["--name", "sgpo", "--zone", "us-east5-a"]
RUN = ["run", *WHERE, "--config", "configs/quickstart.py", "--workdir", "runs/q"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def launch(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=30,
    )


def dry(*arguments):
    """The commands a subcommand would run, each split into its words."""
    result = launch(*arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout.replace("\ngcloud", "\n; gcloud"), comments=False)
    commands = [[]]
    for word in words:
        if word == ";":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def scripts():
    return [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert result.stdout == ""


def test_create():
    assert dry("create", *WHERE, "--type", "v6e-8") == [
        "gcloud compute tpus tpu-vm create sgpo --zone us-east5-a"
        " --accelerator-type v6e-8 --version v2-alpha-tpuv6e".split()
    ]
    (command,) = dry("create", *WHERE, "--type", "v4-8", "--spot", "--project", "my-project")
    assert command[-7:] == (
        "--project my-project --accelerator-type v4-8 --version tpu-ubuntu2204-base --spot".split()
    )[-7:]
    assert "my-project" in command


def test_install_copies_the_commit():
    local, copy, remote = dry("install", *WHERE)
    archive = local[-2]
    assert local[-1] == "HEAD" and "archive" in local
    assert copy[-4:] == [archive, "sgpo:sgpo_jax.tar.gz", "--zone", "us-east5-a"]
    assert remote[:6] == "gcloud compute tpus tpu-vm ssh sgpo".split()
    assert "tar -xzf sgpo_jax.tar.gz" in remote[-1] and "'.[tpu]'" in remote[-1]


def test_fetch_and_delete():
    _, copy = dry("fetch", *WHERE, "--workdir", "runs/q", "--to", "my results")
    assert copy == [
        *"gcloud compute tpus tpu-vm scp --recurse sgpo:runs/q".split(),
        *("my results", "--zone", "us-east5-a"),
    ]
    assert dry("delete", *WHERE) == [
        "gcloud compute tpus tpu-vm delete sgpo --zone us-east5-a --quiet".split()
    ]


@pytest.fixture
def vm(tmp_path):
    """A home folder that stands for the VM, and the PATH with a gcloud that reaches it."""
    home, tools = tmp_path / "home", tmp_path / "bin"
    python = home / "sgpo_jax/.venv/bin/python"
    for path, text in (
        (tools / "gcloud", f'cd {home}\nexec bash -c "${{!#}}"\n'),
        (python, 'printf "<%s> " "$@"\nexit 3\n'),
    ):
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/bash\n" + text)
        path.chmod(0o755)
    return home, f"{tools}:{os.environ['PATH']}"


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock, as the VM has it")
def test_run_follows_the_output_and_hands_on_the_status(vm):
    home, path = vm
    result = launch(*RUN, "--", "--config.rl.steps=5", "--config.note=it's a $HOME", PATH=path)
    assert result.returncode == 3
    expected = (
        f"<-m> <sgpo_jax.main> <--workdir={home}/runs/q> <--config=configs/quickstart.py>"
        " <--config.rl.steps=5> <--config.note=it's a $HOME> "
    )
    assert (home / "runs/q/output.log").read_text() == expected
    assert result.stdout == expected
    # A second run adds to the log; what is followed is the new part alone.
    assert launch(*RUN, PATH=path).stdout.startswith("<-m> <sgpo_jax.main>")
    assert (home / "runs/q/output.log").read_text().count("<-m>") == 2


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock, as the VM has it")
def test_a_second_run_in_the_same_folder_is_refused(vm):
    home, path = vm
    (home / "runs/q").mkdir(parents=True)
    holder = ["flock", str(home / "runs/q/run.lock"), "bash", "-c", "echo held; read -r"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        running.stdout.readline()
        result = launch(*RUN, PATH=path)
        running.stdin.close()
    assert result.returncode == 1
    assert "a run is already writing to" in result.stderr
    assert (home / "runs/q/output.log").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the subcommand is missing"),
        (["destroy"], "unknown subcommand 'destroy'"),
        (["delete", "--zone", "us-east5-a"], "--name is missing"),
        (["delete", "--name", "Sgpo!", "--zone", "us-east5-a"], "--name must be"),
        (["delete", "--name", "sgpo", "--zone", "us-east5"], "--zone must be"),
        (["delete", "--name", "sgpo", "--zone"], "--zone needs a value"),
        (["delete", *WHERE, "--project", "x"], "--project must be"),
        (["delete", *WHERE, "--type", "v6e-8"], "delete takes no --type"),
        (["delete", *WHERE, "now"], "unknown argument 'now'"),
        (["create", *WHERE, "--type", "v6e-256"], "--type must be a slice with one host"),
        (["create", *WHERE, "--", "--config.a=1"], "only run takes arguments after --"),
        (["fetch", *WHERE, "--workdir", "runs; rm -r /", "--to", "x"], "--workdir must be"),
        (["fetch", *WHERE, "--workdir", "runs/q"], "--to is missing"),
        ([*RUN[:-4], "--config", "configs/none.py", "--workdir", "r"], "there is no file"),
        ([*RUN[:-4], "--config", "setup.py", "--workdir", "r"], "--config must be"),
        ([*RUN, "--", "--rl.steps=5"], "only --config.field=value may follow"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(arguments, message, vm):
    result = launch(*arguments, PATH=vm[1])
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_gcloud_must_be_installed(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    result = launch("delete", *WHERE, PATH=str(tmp_path))
    assert result.returncode == 2
    assert "gcloud is not installed" in result.stderr
