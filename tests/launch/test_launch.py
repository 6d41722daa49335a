"""Tests the shared launch scripts, and TPU VMs: dry, or with a gcloud that runs remote commands on this machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.launching import ROOT, bench

WHERE = ["--name", "sgpo", "--zone", "us-east5-a"]
RUN = ["run", *WHERE, "--config", "configs/quickstart.py", "--workdir", "runs/q"]
KEEP = ["keep", *WHERE, "--type", "v6e-16", "--config", "configs/quickstart.py", "--workdir", "runs/q", "--poll", "0"]
NASTY = '--config.note=it\'s "a" $HOME `id` \\ * ; & | ü'
SHARE = "10.0.0.2:/shared"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def here(tmp_path):
    return bench(tmp_path)


def gcloud(*words):
    return ["gcloud", "compute", "tpus", *words]


def scripts():
    return [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert os.access(script, os.X_OK) == script.read_text().startswith("#!")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, "-x", str(script)], capture_output=True, text=True, check=False)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu_vm.sh", ["create", *WHERE, "--type", "v6e-64", "--spot"]),
        ("tpu_vm.sh", ["install", *WHERE, "--share", SHARE, "--project", "my-project"]),
        ("tpu_vm.sh", ["put", *WHERE, "--from", "my data's", "--to", "/shared"]),
        ("tpu_vm.sh", ["exec", *WHERE, "--worker", "all", "--", "printf", "%s", NASTY]),
        ("tpu_vm.sh", [*RUN, "--", NASTY]),
        ("tpu_vm.sh", ["stop", *WHERE]),
        ("tpu_vm.sh", ["collect", *WHERE, "--workdir", "/shared/q", "--to", "my results"]),
        ("tpu_vm.sh", ["fetch", *WHERE, "--from", "/shared/q", "--to", "my results"]),
        ("tpu_vm.sh", ["put", *WHERE, "--from", "my data's", "--to", "gs://my-bucket/data"]),
        ("tpu_vm.sh", ["collect", *WHERE, "--workdir", "gs://my-bucket/q", "--to", "my results"]),
        ("tpu_vm.sh", ["fetch", *WHERE, "--from", "gs://my-bucket/q", "--to", "my results"]),
        ("tpu_vm.sh", ["delete", *WHERE]),
        ("tpu_vm.sh", ["delete", *WHERE, "--queued"]),
        ("kubernetes.sh", ["image", "--image", "registry/sgpo:1", "--extra", "gpu"]),
        ("kubernetes.sh", ["volume", "--claim", "shared", "--share", SHARE, "--namespace", "lab", "--context", "a_b"]),
        ("kubernetes.sh", ["put", "--claim", "shared", "--from", "my data's", "--to", "/shared/data"]),
        ("kubernetes.sh", ["run", "--name", "q", "--image", "i:1", "--claim", "c", "--config", "configs/qwen7b.py:grpo",
                           "--workdir", "/shared/q", "--tpu", "v6e:8x8", "--spot", "--", NASTY]),
        ("kubernetes.sh", ["follow", "--name", "q"]),
        ("kubernetes.sh", ["collect", "--claim", "shared", "--workdir", "/shared/q", "--to", "my results"]),
        ("kubernetes.sh", ["delete", "--name", "q"]),
        ("slurm.sh", ["--nodes", "4", "--gpus", "8", "--time", "1-00:00:00", "--config", "configs/qwen7b.py",
                      "--workdir", "WORKDIR", "--partition", "a,b", "--python", sys.executable, "--", NASTY]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)  # fmt: skip
def test_a_dry_run_prints_what_would_be_run(script, arguments, here):
    """A shell that runs the printed text calls the same programs, with the same words and input, as the real run."""
    arguments = [word.replace("WORKDIR", str(here.home / "q")) for word in arguments]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    dry = here.run(script, *arguments[:split], "--dry-run", *arguments[split:])
    assert dry.returncode == 0, dry.stderr
    assert here.recorded() == []
    assert here.run(script, *arguments).returncode == 0
    real = here.recorded()
    printed = here.bash("-c", dry.stdout)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert here.recorded() == real != []


@pytest.mark.parametrize(
    ("type", "version"),
    [
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_create_takes_the_software_of_the_chip(type, version, here):
    assert here.run("tpu_vm.sh", "create", *WHERE, "--type", type, "--project", "my-project").returncode == 0
    assert here.recorded() == [
        gcloud("tpu-vm", "create", "sgpo", "--zone", "us-east5-a", "--project", "my-project",
               "--accelerator-type", type, "--version", version)
    ]  # fmt: skip


LISTS = {  # the two kinds of `gcloud ... list`
    "request": gcloud("queued-resources", "list", "--zone", "us-east5-a", "--filter", "name ~ /sgpo$",
                      "--format", "value(state.state)"),
    "node": gcloud("tpu-vm", "list", "--zone", "us-east5-a", "--filter", "name ~ /sgpo$", "--format", "value(state)"),
}  # fmt: skip


def answers(here, remote=(), creating=(0,), **states):
    """Installs a gcloud that answers with these states and exit statuses in turn. The last answer repeats."""
    for name, values in {**states, "remote": remote, "creating": creating}.items():
        (here.home / name).write_text("".join(f"{value}\n" for value in values))
    here.tool(
        "gcloud",
        f"""
next() {{
    head -n 1 "{here.home}/$1"
    (($(wc -l <"{here.home}/$1") < 2)) || sed -i 1d "{here.home}/$1"
}}
case "$*" in
"compute tpus queued-resources list "*) next request ;;
"compute tpus tpu-vm list "*) next node ;;
"compute tpus tpu-vm create "*) exit "$(next creating)" ;;
*vm_run.sh*) exit "$(next remote)" ;;
esac
""",
    )


def short(calls):
    """Names the calls that changed something."""
    words = []
    for call in calls:
        remote = call[-1] if "ssh" in call else ""
        if "vm_run" in remote or "vm_setup" in remote:
            words.append("run" if "vm_run" in remote else "setup")
        else:
            words.append(" ".join(call[3:5]).removeprefix("tpu-vm ") if call[0] == "gcloud" else call[0])
    return [word for word in words if not word.endswith("list") and word not in ("git", "scp")]


def test_a_queued_request_is_waited_for(here):
    answers(here, request=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], node=["CREATING", "READY"])
    here.tool("sleep", "")
    (here.tools / "sleep").chmod(0o755)
    result = here.run("tpu_vm.sh", "create", *WHERE, "--type", "v6e-16", "--spot", "--queued")
    assert result.returncode == 0, result.stderr
    calls = here.recorded()
    assert calls[0] == gcloud(
        "queued-resources", "create", "sgpo", "--node-id", "sgpo", "--zone", "us-east5-a", "--accelerator-type",
        "v6e-16", "--spot", "--runtime-version", "v2-alpha-tpuv6e",
    )  # fmt: skip
    looks = [call for call in calls[1:] if call[0] == "gcloud"]
    assert looks == [LISTS[name] for name in ("request", "request", "request", "node", "request", "node")]
    assert [call for call in calls if call[0] == "sleep"] == 3 * [["sleep", "30"]]


def test_a_queued_request_that_fails_is_no_node(here):
    answers(here, request=["FAILED"], node=[""])
    result = here.run("tpu_vm.sh", "create", *WHERE, "--type", "v6e-16", "--queued")
    assert result.returncode == 1
    assert "the request has failed" in result.stderr


@pytest.mark.parametrize(
    ("flags", "states", "remote", "status", "done"),
    [
        ([], {"node": ["READY"]}, [0], 0, ["run"]),
        ([], {"node": ["", "READY"]}, [0], 0, ["create", "setup", "run"]),
        ([], {"node": ["CREATING", "READY"]}, [0], 0, ["run"]),
        ([], {"node": ["PREEMPTED", "READY"]}, [0], 0, ["delete", "create", "setup", "run"]),
        # The TPU is taken away during the run, which was or was not stopped in time.
        ([], {"node": ["READY", "PREEMPTED", "READY"]}, [75, 0], 0, ["run", "delete", "create", "setup", "run"]),
        ([], {"node": ["READY", "PREEMPTED", "PREEMPTED"]}, [255, 0], 0, ["run", "delete", "create", "setup", "run"]),
        # The run is stopped many times on a TPU that stays, which is not a failure.
        ([], {"node": ["READY"]}, [75, 75, 75, 75, 0], 0, 5 * ["run"]),
        # A new VM without the package.
        ([], {"node": ["READY"]}, [69, 0], 0, ["run", "setup", "run"]),
        (["--queued"], {"request": ["ACTIVE"], "node": ["", "READY"]}, [0], 0,
         ["queued-resources delete", "queued-resources create", "setup", "run"]),
        # The run fails by itself.
        ([], {"node": ["READY"]}, [1], 1, 3 * ["run"]),
        (["--retries", "1"], {"node": ["READY"]}, [1], 1, ["run"]),
        (["--queued"], {"request": ["SUSPENDED", "ACTIVE"], "node": ["READY"]}, [0], 0,
         ["queued-resources delete", "queued-resources create", "setup", "run"]),
        (["--queued"], {"request": ["WAITING_FOR_RESOURCES", "ACTIVE"], "node": ["READY"]}, [0], 0, ["run"]),
        (["--queued"], {"request": ["", "ACTIVE"], "node": ["READY"]}, [0], 0,
         ["queued-resources create", "setup", "run"]),
        (["--queued"], {"request": ["ACTIVE", "ACTIVE"], "node": ["PREEMPTED", "READY"]}, [0], 0,
         ["queued-resources delete", "queued-resources create", "setup", "run"]),
    ],
)  # fmt: skip
def test_keep_sees_the_run_through(flags, states, remote, status, done, here):
    answers(here, remote, **states)
    result = here.run("tpu_vm.sh", *KEEP, *flags, "--", NASTY)
    assert result.returncode == status, result.stdout + result.stderr
    assert short(here.recorded()) == done


def test_keep_asks_until_there_is_room(here):
    answers(here, [0], creating=[1, 1, 1, 1, 1, 0], node=[""])
    assert here.run("tpu_vm.sh", *KEEP).returncode == 0
    assert short(here.recorded()) == [*6 * ["create"], "setup", "run"]


def test_keep_does_not_take_a_failing_gcloud_for_a_missing_node(here):
    here.tool("gcloud", "exit 4")
    result = here.run("tpu_vm.sh", *KEEP)
    assert result.returncode == 4
    assert here.recorded() == 6 * [LISTS["node"]]


def test_keep_prints_the_commands_of_the_other_subcommands(here):
    queued = [*KEEP, "--project", "my-project", "--queued", "--spot", "--share", SHARE, "--dry-run"]
    dry = here.run("tpu_vm.sh", *queued, "--", NASTY)
    assert here.recorded() == []
    assert here.bash("-c", dry.stdout).returncode == 0
    assert short(here.recorded()) == ["queued-resources delete", "queued-resources create", "setup", "run"]
    for subcommand, *arguments in (
        ["delete", "--queued"],
        ["create", "--type", "v6e-16", "--spot", "--queued"],
        ["install", "--share", SHARE],
        [*RUN[:1], *RUN[5:], "--", NASTY],
    ):
        where = [*WHERE, "--project", "my-project", "--dry-run"]
        assert here.run("tpu_vm.sh", subcommand, *where, *arguments).stdout in dry.stdout


@pytest.fixture
def vm(here):
    """Returns a bench whose gcloud runs remote commands in `home`, where the package is installed."""
    shutil.copytree(here.tree / "launch", here.home / "sgpo_jax" / "launch")
    here.tool("gcloud", '[[ $4 != ssh ]] || { cd "$HOME" && exec bash -c "${!#}"; }')
    (here.tools / "rm").unlink()
    program(here, 'printf "<%s> " "$@"\nexit 3')
    return here


def program(here, text):
    """Installs a program in place of Python on the VM."""
    python = here.home / "sgpo_jax/.venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text("#!/bin/bash\n" + text)
    python.chmod(0o755)


needs_flock = pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock, as the VM has it")


@needs_flock
def test_run_follows_the_output_and_hands_on_the_status(vm):
    result = vm.run("tpu_vm.sh", *RUN, "--", "--config.rl.steps=5", NASTY)
    log = vm.home / "runs/q/output.3.log"
    expected = "".join(
        f"<{word}> "
        for word in ("-m", "sgpo_jax.main", "--distributed", f"--workdir={vm.home}/runs/q",
                     "--config=configs/quickstart.py", "--config.grace=20", "--config.rl.steps=5", NASTY)
    )  # fmt: skip
    assert result.returncode == 3
    assert log.read_text() == expected == result.stdout
    (call,) = vm.recorded()
    assert call[:-1] == gcloud("tpu-vm", "ssh", "sgpo", "--zone", "us-east5-a", "--worker", "all", "--command")
    # A second run appends to the log, and only the new part is printed.
    assert vm.run("tpu_vm.sh", *RUN).stdout.count("<-m>") == 1
    assert log.read_text().count("<-m>") == 2


@needs_flock
def test_a_run_in_a_bucket_has_its_output_on_the_worker(vm):
    result = vm.run("tpu_vm.sh", *RUN[:-1], "gs://my-bucket/q")
    assert result.returncode == 3 and "<--workdir=gs://my-bucket/q> " in result.stdout
    assert (vm.home / "sgpo_jax.run/output.3.log").read_text() == result.stdout
    assert sorted(path.name for path in vm.home.iterdir() if "gs:" in path.name) == []


@pytest.mark.parametrize("arguments", [["create", *WHERE, "--type", "v6e-8"], ["install", *WHERE], KEEP])
def test_what_is_not_committed_is_said_before_anything_is_paid_for(arguments, here):
    here.tool("git", '[[ $3 != status ]] || echo " M configs/quickstart.py"')
    here.tool("gcloud", 'echo "paid" >&2; exit 1')
    result = here.run("tpu_vm.sh", *arguments, *["--retries", "1", "--poll", "0"] * (arguments is KEEP))
    lines = result.stderr.splitlines()
    assert lines[0] == "tpu_vm.sh: these changes are not committed, and do not reach the machines:"
    assert lines[1:3] == [" M configs/quickstart.py", "paid"]


def test_a_config_that_is_not_committed_is_refused_before_anything_is_paid_for(here):
    here.tool("git", "[[ $3 != cat-file ]]")
    result = here.run("tpu_vm.sh", *KEEP)
    assert result.returncode == 2 and "is not committed, and the machines get the committed tree only" in result.stderr
    assert here.recorded() == []


@needs_flock
def test_run_follows_an_active_run_and_refuses_another(vm):
    program(vm, 'echo begun\nuntil [[ -e "$HOME/end" ]]; do sleep 0.05; done\necho ended\nexit 5')
    command = ["bash", str(vm.tree / "launch/tpu_vm.sh"), *RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=vm.environment()) as lost:
        assert lost.stdout.readline() == "begun\n"
        other = vm.run("tpu_vm.sh", *RUN, "--", "--config.seed=1")
        assert (other.returncode, other.stdout) == (1, "")
        assert "another run is active here: .venv/bin/python -m sgpo_jax.main" in other.stderr
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=vm.environment()) as second:
            assert second.stdout.readline() == "begun\n"
            (vm.home / "end").touch()
            assert second.stdout.read() == "ended\n"
            assert second.wait() == 5
        assert lost.wait() == 5
    assert (vm.home / "runs/q/output.3.log").read_text() == "begun\nended\n"


@needs_flock
def test_a_run_that_was_killed_does_not_end_like_the_one_before(vm):
    assert vm.run("tpu_vm.sh", *RUN).returncode == 3
    program(vm, "kill -KILL $PPID\nsleep 0.1")
    result = vm.run("tpu_vm.sh", *RUN)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (137, "the run was killed")


@needs_flock
def test_what_outlives_a_run_does_not_keep_the_next_one_out(vm):
    program(vm, "sleep 20 >/dev/null 2>&1 &\necho begun $!")
    first, second = (vm.run("tpu_vm.sh", *RUN) for _ in range(2))
    assert first.returncode == second.returncode == 0
    ids = [int(result.stdout.split()[1]) for result in (first, second)]
    for id in ids:
        os.kill(id, signal.SIGKILL)
    assert ids[0] != ids[1]


@needs_flock
def test_stop_reaches_the_run_which_can_go_on(vm):
    program(vm, 'trap "echo saved; exit 0" TERM\necho begun\nwhile :; do sleep 0.05; done')
    command = ["bash", str(vm.tree / "launch/tpu_vm.sh"), *RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=vm.environment()) as running:
        assert running.stdout.readline() == "begun\n"
        assert vm.run("tpu_vm.sh", "stop", *WHERE).returncode == 0
        assert running.stdout.read() == "saved\n"
        assert running.wait() == 75


def test_what_is_not_installed_has_a_status_of_its_own(vm):
    vm.tool("mountpoint", "exit 1")
    result = vm.run("tpu_vm.sh", *RUN[:-1], "/shared/q")
    assert (result.returncode, "is not mounted" in result.stderr) == (69, True)
    assert vm.recorded()[1] == ["mountpoint", "--quiet", "/shared"]
    shutil.rmtree(vm.home / "sgpo_jax")
    assert vm.run("tpu_vm.sh", *RUN).returncode == 69
    assert vm.run("tpu_vm.sh", "exec", *WHERE, "--", "true").returncode == 69


def test_exec_runs_in_the_package_with_its_environment(vm):
    text = 'pwd; command -v python; printf "<%s>" "$@"'
    result = vm.run("tpu_vm.sh", "exec", *WHERE, "--", "bash", "-c", text, "x", NASTY)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{vm.home}/sgpo_jax\n{vm.home}/sgpo_jax/.venv/bin/python\n<{NASTY}>"
    assert vm.recorded()[0][-4:-1] == ["--worker", "0", "--command"]


def test_install_mounts_the_share_once_and_installs_on_every_worker(vm):
    vm.tool("mountpoint", '[[ -e "$HOME/mounted" ]]')
    vm.tool("tar", "")
    program(vm, "")
    # The mount point is a folder that this test can create.
    setup = vm.home / "sgpo_jax/launch/vm_setup.sh"
    setup.write_text(setup.read_text().replace("/shared", f"{vm.home}/shared"))
    vm.tool("sudo", f'[[ $1 != mount ]] || {{ touch "$HOME/mounted"; mkdir {vm.home}/shared; }}')
    install = ["install", *WHERE, "--share", SHARE]
    assert vm.run("tpu_vm.sh", *install).returncode == 0
    calls = vm.recorded()
    archive = f"{vm.tree}/build/sgpo_jax.tar.gz"
    assert calls[:2] == [
        ["git", "-C", str(vm.tree), "archive", "--output", archive, "HEAD"],
        gcloud("tpu-vm", "scp", archive, "sgpo:sgpo_jax.tar.gz", "--zone", "us-east5-a", "--worker", "all"),
    ]
    (mount,) = (call for call in calls if call[:2] == ["sudo", "mount"])
    assert mount == ["sudo", "mount", "-t", "nfs", "-o", "hard,nfsvers=3,actimeo=0", SHARE, f"{vm.home}/shared"]
    installed = ["--quiet", "--python", ".venv", "--editable", ".[tpu,buckets]"]
    assert ["python3", "-m", "uv", "pip", "install", *installed] in calls
    assert os.readlink(vm.home / "sgpo_jax/data") == f"{vm.home}/shared/data"
    assert vm.run("tpu_vm.sh", *install).returncode == 0
    assert [call for call in vm.recorded() if call[0] == "sudo"] == []


@needs_flock
def test_install_leaves_an_active_run_alone(vm):
    (vm.home / "sgpo_jax.run").mkdir()
    lock = str(vm.home / "sgpo_jax.run/lock")
    with subprocess.Popen(
        ["flock", lock, "bash", "-c", "echo held; read -r"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        running.stdout.readline()
        result = vm.run("tpu_vm.sh", "install", *WHERE)
        running.stdin.close()
    assert result.returncode == 1
    assert "a run is active here" in result.stderr
    assert "tar" not in [call[0] for call in vm.recorded()]
    program(vm, "")
    assert vm.run("tpu_vm.sh", "install", *WHERE).returncode == 0


@pytest.mark.parametrize(
    ("text", "signals", "status"),
    [
        ("exit 0", 0, 0),
        ("exit 3", 0, 3),
        ("trap 'exit 0' TERM; echo on; while :; do sleep 0.02; done", 1, 75),
        ("trap 'exit 1' TERM; echo on; while :; do sleep 0.02; done", 1, 1),  # it could not save
        ("echo on; exec sleep 60", 1, 75),  # it does not handle SIGTERM yet
        ("trap 'n=$((n + 1)); ((n < 2)) || exit 0' TERM; echo on; while :; do sleep 0.02; done", 2, 75),
    ],
)
def test_the_status_tells_whether_there_is_more_to_do(text, signals, status, tmp_path):
    command = [str(ROOT / "launch/preemptible.sh"), "--status", str(tmp_path / "status"), "bash", "-c", text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for _ in range(signals):
            if _ == 0:
                assert running.stdout.readline() == "on\n"
            running.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert running.wait(timeout=20) == status
    assert (tmp_path / "status").read_text() == f"{status}\n"


def test_sigterm_reaches_a_run_of_ours_and_is_no_end():
    """Runs the real `preemption` under the script that the schedulers start."""
    text = """
import time
from sgpo_jax import cli
from sgpo_jax.runtime import preemption
def run(flags):
    preemption.watch(20)
    print("begun", flush=True)
    while True:
        preemption.check()
        time.sleep(0.01)
cli.start("run", cli.Command("", "__main__:run", config="", announced=False))
"""
    command = [str(ROOT / "launch/preemptible.sh"), sys.executable, "-c", text]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout.readline() == "begun\n"
        running.terminate()
        assert running.stdout.read().splitlines()[-1].startswith("sgpo_jax: stopped by SIGTERM")
        assert running.wait(timeout=20) == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the subcommand is missing"),
        (["destroy"], "unknown subcommand 'destroy'"),
        (["delete", "--zone", "us-east5-a"], "--name is missing"),
        (["delete", "--name", "Sgpo!", "--zone", "us-east5-a"], "--name must be"),
        (["delete", "--name", "sgpo\nx", "--zone", "us-east5-a"], "--name must be"),
        (["delete", "--name", "sgpo", "--zone", "us-east5"], "--zone must be"),
        (["delete", "--name", "sgpo", "--zone"], "--zone needs a value"),
        (["delete", *WHERE, "--project", "x"], "--project must be"),
        (["delete", *WHERE, "--type", "v6e-8"], "delete takes no '--type'"),
        (["delete", *WHERE, "now"], "delete takes no 'now'"),
        (["create", *WHERE, "--type", "v6e-12"], "--type must be"),
        (["create", *WHERE, "--type", "v5p-12"], "--type must be"),
        (["create", *WHERE], "--type is missing"),
        (["create", *WHERE, "--", "--config.a=1"], "create takes nothing after --"),
        (["install", *WHERE, "--share", "10.0.0.2:/a b"], "--share must be"),
        (["exec", *WHERE], "the command is missing"),
        (["exec", *WHERE, "--worker", "1,2", "--", "true"], "--worker must be"),
        (["put", *WHERE, "--to", "/shared"], "--from is missing"),
        (["fetch", *WHERE, "--from", "runs; rm -r /", "--to", "x"], "--from must be"),
        (["collect", *WHERE, "--workdir", "runs/q"], "--to is missing"),
        (["collect", *WHERE, "--workdir", "$(id)", "--to", "x"], "--workdir must be"),
        (["put", *WHERE, "--from", "data", "--to", "gs://B/$(id)"], "--to must be a place in a bucket"),
        ([*RUN[:-4], "--config", "configs/none.py", "--workdir", "r"], "there is no file"),
        ([*RUN[:-4], "--config", "setup.py", "--workdir", "r"], "--config must be"),
        ([*RUN, "--", "--rl.steps=5"], "only --config.field=value may follow"),
        ([*KEEP, "--retries", "0"], "--retries must be"),
        ([*KEEP, "--poll", "soon"], "--poll must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused_before_anything_is_run(arguments, message, here):
    result = here.run("tpu_vm.sh", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    first, hint = result.stderr.replace("\nx", "x").splitlines()
    assert first.startswith("tpu_vm.sh: ") and message in first
    assert hint == "launch/tpu_vm.sh --help tells how to use it"
    assert here.recorded() == []


@pytest.mark.parametrize(
    ("script", "arguments", "tool"),
    [
        ("tpu_vm.sh", ["delete", *WHERE], "gcloud"),
        ("kubernetes.sh", ["delete", "--name", "q"], "kubectl"),
        ("slurm.sh", "--nodes 1 --gpus 1 --time 1:00:00 --config configs/lab.py --workdir /q".split(), "sbatch"),
    ],
)
def test_tools_must_be_installed_unless_nothing_is_run(script, arguments, tool, here, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / "bare" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bare" / name).symlink_to(shutil.which(name))
    result = here.run(script, *arguments, PATH=str(tmp_path / "bare"))
    assert result.returncode == 2
    assert f"{tool} is not installed" in result.stderr
    assert here.run(script, *arguments, "--dry-run", PATH=str(tmp_path / "bare")).returncode == 0


@pytest.mark.parametrize("script", ["tpu_vm.sh", "kubernetes.sh", "slurm.sh"])
def test_help_names_every_option_that_the_script_reads(script, here):
    result = here.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    source = (ROOT / "launch" / script).read_text()
    known = re.findall(r'(?:values\+?|flags)="([\w -]*)"|^parse slurm.sh "([\w -]*)"', source, re.M)
    options = {word for groups in known for text in groups for word in text.split()}
    assert len(options) > 8
    assert {word for word in options if f"--{word}" not in result.stdout} == set()
