"""Tests the JobSet and the batch job: what is submitted, and what follows when a run is stopped."""

import re
import shutil
import sys

import pytest
import yaml
from helpers.launching import ROOT, bench

JOB = ["--name", "qwen7b", "--image", "registry/sgpo:1", "--claim", "shared"]
WHAT = ["--config", "configs/qwen7b.py", "--workdir", "/shared/q"]
NASTY = '--config.note=it\'s "a" $HOME $(PROCESS) $$ `id` \\ * : # & | {ü}'

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def here(tmp_path):
    return bench(tmp_path)


def submitted(here, *arguments):
    """Returns the documents that kubectl receives."""
    result = here.run("kubernetes.sh", *arguments)
    assert result.returncode == 0, result.stderr
    (call,) = here.recorded()
    assert call[:-1] == ["kubectl", "create", "--filename", "-"]
    return list(yaml.safe_load_all(call[-1].removeprefix("stdin: ")))


def jobset(here, *arguments):
    (document,) = submitted(here, "run", *JOB, *WHAT, *arguments)
    (job,) = document["spec"]["replicatedJobs"]
    assert job["replicas"] == 1
    return document, job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def expanded(words, **variables):
    """Expands words as Kubernetes does: known $(NAME) by its value, $$ to $."""
    pattern = re.compile(r"\$\$|\$\((\w+)\)")
    return [pattern.sub(lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), word) for word in words]


@pytest.mark.parametrize(
    ("slice", "pods", "chips", "accelerator"),
    [
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
        ("v6e:2x4", 1, 8, "tpu-v6e-slice"),
        ("v6e:8x8", 16, 4, "tpu-v6e-slice"),
        ("v5e:16x16", 64, 4, "tpu-v5-lite-podslice"),
        ("v5p:2x2x1", 1, 4, "tpu-v5p-slice"),
        ("v5p:4x4x8", 32, 4, "tpu-v5p-slice"),
        ("v4:2x2x4", 4, 4, "tpu-v4-podslice"),
    ],
)
def test_a_slice_gets_a_pod_for_each_machine(slice, pods, chips, accelerator, here):
    document, job, pod = jobset(here, "--tpu", slice)
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (pods, pods, "Indexed")
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": slice.split(":")[1],
    }
    assert "tolerations" not in pod
    assert document["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    command = "launch/preemptible.sh python -m sgpo_jax.main --distributed".split()
    assert pod["containers"][0]["command"][:5] == command


def test_nodes_with_gpus_find_each_other_by_the_names_of_the_jobset(here):
    document, job, pod = jobset(here, "--nodes", "4", "--gpus", "8", "--gpu-type", "nvidia-h100-80gb", "--spot")
    (container,) = pod["containers"]
    assert (job["parallelism"], job["completions"]) == (4, 4)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    name, worker = document["metadata"]["name"], document["spec"]["replicatedJobs"][0]["name"]
    (process,) = (variable for variable in container["env"] if variable["name"] == "PROCESS")
    assert process["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )
    words = expanded(container["command"], PROCESS="3")
    assert words[4:7] == [f"--coordinator={name}-{worker}-0-0.{name}:8476", "--processes=4", "--process=3"]
    assert jobset(here, "--nodes", "1", "--gpus", "1")[2].get("nodeSelector") is None


def test_the_run_gets_its_arguments_as_they_were_given(here):
    _, _, pod = jobset(here, "--tpu", "v6e:8x8", "--grace", "10", "--", NASTY, "--config.rl.steps=5")
    assert expanded(pod["containers"][0]["command"], PROCESS="0")[5:] == [
        "--workdir=/shared/q", "--config=configs/qwen7b.py", "--config.grace=10", NASTY, "--config.rl.steps=5",
    ]  # fmt: skip
    assert pod["terminationGracePeriodSeconds"] > 10


def test_a_run_that_was_stopped_begins_again_and_others_fail_in_the_end(here):
    document, job, pod = jobset(here, "--tpu", "v6e:8x8", "--retries", "2")
    stopped = int(re.search(r"^    status=(\d+)$", (ROOT / "launch/preemptible.sh").read_text(), re.M)[1])
    exits, disruptions = job["podFailurePolicy"]["rules"]
    assert exits == {
        "action": "FailJob",
        "onExitCodes": {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [stopped]},
    }
    assert disruptions == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert document["spec"]["failurePolicy"] == {
        "maxRestarts": 2,
        "rules": [{"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }


def test_everything_is_on_the_volume(here):
    _, _, pod = jobset(here, "--tpu", "v6e:8x8")
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared": "/shared", "memory": "/dev/shm"}
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert {"name": "HF_HOME", "value": "/shared/huggingface"} in container["env"]


def test_a_run_in_a_bucket_needs_no_volume(here):
    job = [*JOB[:4], *WHAT[:2], "--workdir", "gs://my-bucket/q", "--account", "trainer", "--tpu", "v6e:8x8"]
    (document,) = submitted(here, "run", *job)
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "--workdir=gs://my-bucket/q" in container["command"] and pod["serviceAccountName"] == "trainer"
    assert [volume["name"] for volume in pod["volumes"]] == ["memory"] == [m["name"] for m in container["volumeMounts"]]
    assert [variable["name"] for variable in container["env"]] == ["PROCESS"]
    result = here.run("kubernetes.sh", "collect", "--workdir", "gs://my-bucket/q", "--to", "results")
    assert result.returncode == 0, result.stderr
    exclude = ["--recursive", "--exclude", "(.*/)?checkpoints/.*"]
    assert here.recorded() == [["gcloud", "storage", "rsync", *exclude, "gs://my-bucket/q", "results"]]


@pytest.mark.parametrize("name", ["on", "n", "null", "true", "e1", "y-1"])
def test_names_that_yaml_reads_as_something_else_stay_names(name, here):
    job = ["--name", name, "--image", "i", "--claim", name, *WHAT, "--nodes", "1", "--gpus", "1"]
    (document,) = submitted(here, "run", *job)
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert document["metadata"]["name"] == name
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == name
    volume, claim = submitted(here, "volume", "--claim", name, "--share", "10.0.0.2:/a/b")
    assert claim["metadata"]["name"] == name == volume["metadata"]["name"] == claim["spec"]["volumeName"]


def test_the_volume_is_the_share_and_outlives_its_claim(here):
    volume, claim = submitted(here, "volume", "--claim", "shared", "--share", "10.0.0.2:/a/b")
    assert volume["spec"]["nfs"] == {"server": "10.0.0.2", "path": "/a/b"}
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == ["ReadWriteMany"]
    options = re.search(r"nfs -o (\S+)", (ROOT / "launch/vm_setup.sh").read_text())[1]
    assert ",".join(volume["spec"]["mountOptions"]) == options


@pytest.mark.parametrize("copy_fails", [False, True])
def test_files_go_through_a_pod_that_is_removed_whatever_happens(copy_fails, here):
    here.tool("kubectl", f"[[ $1 != cp ]] || exit {int(copy_fails)}")
    result = here.run("kubernetes.sh", "put", "--claim", "shared", "--from", "data", "--to", "/shared/data")
    assert result.returncode == int(copy_fails)
    create, wait, copy, delete = here.recorded()
    pod = yaml.safe_load(create[-1].removeprefix("stdin: "))
    name = pod["metadata"]["name"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "shared"
    assert wait[1:4] == ["wait", "--for=condition=Ready", f"pod/{name}"]
    assert copy == ["kubectl", "cp", "data", f"{name}:/shared/data"]
    assert delete[1:4] == ["delete", "pod", name]


def test_a_pod_of_somebody_else_is_left_alone(here):
    here.tool("kubectl", "[[ $1 != create ]] || exit 1")
    assert here.run("kubernetes.sh", "put", "--claim", "c", "--from", "data", "--to", "/shared/data").returncode == 1
    assert len(here.recorded()) == 1


def test_the_image_is_of_the_commit_and_of_an_extra_that_exists(here):
    result = here.run("kubernetes.sh", "image", "--image", "registry/sgpo:1", "--extra", "gpu")
    assert result.returncode == 0, result.stderr
    archive, build, push = here.recorded()
    assert archive[-1] == "HEAD"
    words = "docker build --file launch/Dockerfile --build-arg EXTRA=gpu --tag registry/sgpo:1 -".split()
    assert build == [*words, "stdin: archive"]
    assert push == ["docker", "push", "registry/sgpo:1"]
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    assert 'pip install --no-cache-dir --editable ".[$EXTRA,buckets]"' in dockerfile
    extras = re.findall(r'^    "(\w+)":', (ROOT / "setup.py").read_text(), re.M)
    assert {"tpu", "gpu", "buckets"} <= set(extras)
    python = re.search(r"FROM python:3\.(\d+)", dockerfile)[1]
    low, high = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', (ROOT / "setup.py").read_text()).groups()
    assert int(low) <= int(python) < int(high)


SLURM = [*"--nodes 4 --gpus 8 --time 24:00:00 --config configs/qwen7b.py --python".split(), sys.executable]


def test_the_job_asks_for_whole_nodes_and_for_time_to_save(here):
    workdir = str(here.home / "q")
    result = here.run("slurm.sh", *SLURM, "--workdir", workdir, "--grace", "100", "--account", "a", "--", NASTY)
    assert result.returncode == 0, result.stderr
    (call,) = here.recorded()
    script = call.index(f"{here.tree}/launch/slurm_job.sh")
    assert dict(word.lstrip("-").partition("=")[::2] for word in call[1:script]) == {
        "job-name": "sgpo", "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "8", "exclusive": "", "mem": "0",
        "time": "24:00:00", "signal": "TERM@160", "requeue": "", "open-mode": "append", "account": "a",
        "output": f"{workdir}/slurm.log", "chdir": str(here.tree),
    }  # fmt: skip
    assert call[script + 1 :] == [
        "8", sys.executable, f"--workdir={workdir}", "--config=configs/qwen7b.py", "--config.grace=100", NASTY,
    ]  # fmt: skip
    assert (here.home / "q").is_dir()  # or SLURM could not write the output


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [(0, "RUNNING", False), (75, "RUNNING", True), (75, "COMPLETING", False), (1, "RUNNING", False)],
)
def test_the_job_goes_back_into_the_queue_when_it_was_stopped(status, state, requeued, here):
    here.tool("srun", f'echo "devices $JAX_LOCAL_DEVICE_IDS"; exit {status}')
    here.tool("squeue", f"echo {state}")
    result = here.run("slurm_job.sh", "4", "python", "--workdir=/q", NASTY, SLURM_JOB_ID="7", SLURM_CPUS_ON_NODE="96")
    assert result.returncode == status
    assert result.stdout.startswith("devices 0,1,2,3\n")
    srun, *rest = here.recorded()
    assert srun == ["srun", "--cpus-per-task=96", "--kill-on-bad-exit=0", "launch/preemptible.sh", "python", "-m",
                    "sgpo_jax.main", "--distributed", "--workdir=/q", NASTY]  # fmt: skip
    assert (["scontrol", "requeue", "7"] in rest) == requeued


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("kubernetes.sh", ["destroy"], "unknown subcommand 'destroy'"),
        ("kubernetes.sh", ["run", *JOB, *WHAT], "--tpu is missing, or --nodes and --gpus"),
        ("kubernetes.sh", ["run", *JOB, *WHAT, "--tpu", "v6e:8x8", "--gpus", "8"], "give it without them"),
        ("kubernetes.sh", ["run", *JOB, *WHAT, "--tpu", "v6e:3x3"], "--tpu must be a slice"),
        ("kubernetes.sh", ["run", *JOB, *WHAT, "--tpu", "v5p:1x1x2"], "a multiple of 4 chips"),
        ("kubernetes.sh", ["run", *JOB, *WHAT, "--nodes", "4"], "--gpus is missing"),
        ("kubernetes.sh", ["run", *JOB, *WHAT[:3], "/q", "--tpu", "v6e:8x8"], "a plain path in /shared"),
        ("kubernetes.sh", ["run", *JOB[:4], *WHAT, "--tpu", "v6e:8x8"], "--claim is missing; without one"),
        ("kubernetes.sh", ["run", *JOB, *WHAT[:3], "gs://b/$x", "--tpu", "v6e:8x8"], "must be a place in a bucket"),
        ("kubernetes.sh", ["run", *JOB[:4], "--claim", "A", *WHAT, "--tpu", "v6e:8x8"], "--claim must be"),
        ("kubernetes.sh", ["run", "--name", "x" * 41, *JOB[2:], *WHAT, "--tpu", "v6e:8x8"], "--name must be"),
        ("kubernetes.sh", ["run", *JOB, *WHAT, "--tpu", "v6e:8x8", "--grace", "0"], "--grace must be"),
        ("kubernetes.sh", ["run", *JOB, *WHAT, "--tpu", "v6e:8x8", "--", "--config.a=\n"], "without line breaks"),
        ("kubernetes.sh", ["run", *JOB, *WHAT, "--tpu", "v6e:8x8", "--", "--seed=1"], "only --config.field=value"),
        ("kubernetes.sh", ["image", "--image", "a b", "--extra", "tpu"], "--image must be"),
        ("kubernetes.sh", ["image", "--image", "a", "--extra", "test"], "--extra must be"),
        ("kubernetes.sh", ["volume", "--claim", "c"], "--share is missing"),
        ("kubernetes.sh", ["delete", "--name", "q", "--namespace", "a b"], "--namespace must be"),
        ("slurm.sh", [], "--nodes is missing"),
        ("slurm.sh", [*SLURM, "--workdir", "q"], "--workdir must be a plain absolute path"),
        ("slurm.sh", [*SLURM, "--workdir", "/q", "--time", "soon"], "--time must be"),
        ("slurm.sh", [*SLURM, "--workdir", "/q", "--partition", "a b"], "--partition must be"),
        ("slurm.sh", [*SLURM, "--workdir", "/q", "--python", "/no/python"], "there is no program /no/python"),
        ("slurm.sh", [*SLURM, "--workdir", "/q", "--grace", "1m"], "--grace must be"),
        ("slurm.sh", [*SLURM, "--workdir", "/q", "now"], "slurm.sh takes no 'now'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused_before_anything_is_run(script, arguments, message, here):
    result = here.run(script, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert here.recorded() == []
