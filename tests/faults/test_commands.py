"""A sample of the catalogue through the commands: exit code, one line, no stack trace, nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import xla_flags
from helpers.paths import ROOT

from sgpo_jax import cli

QUICKSTART = "--config=configs/quickstart.py"
# name: (module, arguments, with {place} for a folder, the line on stderr)
COMMANDS = {
    "mesh beyond the devices": ("main", ["--config.mesh.data=8"], r"mesh\.data=8, .* needs .* 8 devices; there are 1"),
    "two sizes to fill in": ("main", ["--config.mesh.data=-1"], r"config\.mesh\.data=-1: must be at least 1 when"),
    "a number for stages": ("main", ["--config.stages=5"], r"config\.stages=\(5,\): must be one or more of"),
    "infinite rate": ("main", ["--config.rl.learning_rate=inf"], r"config\.rl\.learning_rate=inf: must be a finite"),
    # In a folder where an earlier run was refused before it had done anything.
    "file of no rows": (
        "main",
        ["--config.sft.train={place}/empty.jsonl", "--workdir={place}/refused"],
        r"empty\.jsonl': there are no rows in it",
    ),
    "broken row": ("main", ["--config.sft.train={place}/broken.jsonl"], r"broken\.jsonl:2: not valid JSON in UTF-8"),
    "pickled model": (
        "main",
        ["--config.model.source={place}/pickled", "--config.model.tokenizer=arithmetic",
         "--config.sft.train={place}/broken.jsonl"],  # said before the rows are read
        r"has neither .*; pickles are never opened: pytorch_model\.bin",
    ),
    "model without config": ("main", ["--config.model.source={place}/none"], r"none/config\.json cannot be read as"),
    "workdir that is a file": ("main", ["--workdir={place}/empty.jsonl"], r"--workdir=.*: must be a folder that can"),
    "workdir of an odd run": ("main", ["--workdir={place}/odd"], r"odd/config\.json: is not the config of an earlier"),
    "nothing to export": (
        "export", ["--workdir={place}/none", "--to={place}/out"], r"there is no checkpoint of stage 'rl'",
    ),
    "nothing to evaluate": ("evaluate", ["--checkpoint={place}/none"], r"--checkpoint=.*: there is no such checkpoint"),
    "nothing to replay": (
        "replay", ["--workdir={place}/none", "--batch={place}/good.jsonl"],
        r"good\.jsonl: must be a skipped_batch_STEP\.npz that a run left behind",
    ),
    "a paper's row that is none": (
        "evaluate", ["--model=smollm2", "--out={place}/out", "--paper=gpt"], r"--paper=gpt: must be one of",
    ),
    "topology that is none": ("plan", ["--topology=v9:4x4"], r"--topology=v9:4x4: must be v5e, v6e, v5p, ':' and the"),
    "search without chips": ("plan", ["--topology=auto"], r"--chips=: must be given with --topology=auto, and only"),
    "response beyond its limit": (
        "plan", ["--topology=v5e:2x2", "--response_tokens=29"], r"--response_tokens=29: must be between 1 and 28",
    ),
    "lengths of no run": (
        "plan", ["--topology=v5e:2x2", "--lengths={place}"], r"--lengths=.*: rl.jsonl must be there",
    ),
    "lengths and a mean": (
        "plan", ["--topology=v5e:2x2", "--lengths={place}", "--response_tokens=8"],
        r"--lengths=.*: must not be given with --response_tokens",
    ),
    "plan of an unknown model": (
        "plan", ["--topology=v5e:2x2", "--config.model.source=Org/model"],
        r"config\.model\.source='Org/model': without a network the shapes of these are known: Qwen/Qwen2\.5-0\.5B",
    ),
    "strategies without endpoint": (
        "strategies", ["--config.extract.source={place}/good.jsonl"],
        r"config\.extract\.strong\.name='': must name a model, or OPENAI_MODEL",
    ),
    "strategies without key": (
        "strategies",
        ["--config.extract.source={place}/good.jsonl", "--config.extract.strong.name=m",
         "--config.extract.strong.base_url=http://127.0.0.1:9/v1"],
        r"the environment variable OPENAI_API_KEY .* is not set",
    ),
}  # fmt: skip


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
    ours = {"XLA_FLAGS": xla_flags.quick(1), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return kept | ours | more


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("commands")
    row = json.dumps({"id": "a", "problem": "p", "answer": "1"})
    for name, text in {"empty": "", "broken": f"{row}\n{{", "good": row}.items():
        (place / f"{name}.jsonl").write_text(text)
    for name in ("none", "odd", "pickled", "refused"):
        (place / name).mkdir()
    (place / "odd/config.json").write_text("odd")
    (place / "refused/config.json").write_text('{"sft": {"train": "another"}}')
    (place / "odd/sft/checkpoints/1").mkdir(parents=True)
    sizes = {"vocab_size": 200, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}  # fmt: skip
    (place / "pickled/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
    (place / "pickled/pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    return place


@pytest.fixture(scope="module")
def started(place):
    """Starts one process for all commands, and two that fail during the imports, which a fork does not repeat."""
    calls = []
    for module, arguments, _ in COMMANDS.values():
        arguments = [argument.format(place=place) for argument in arguments]
        if module in ("main", "strategies") and not arguments[-1].startswith("--workdir"):
            arguments.append(f"--workdir={place}/run{len(calls)}")
        config = "--config=configs/strategies.py" if module == "strategies" else QUICKSTART
        if any("model.tokenizer" in argument or "model.source" in argument for argument in arguments):
            arguments.append("--config.stages=('sft',)")
        calls.append([f"sgpo_jax.{module}", [config, *arguments]])
    (place / "calls.json").write_text(json.dumps(calls))
    metadata = place / "old/jax-0.4.30.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.4.30\n")
    main = [sys.executable, "-m", "sgpo_jax.main", QUICKSTART, f"--workdir={place}/run"]

    def start(arguments, **more):
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    processes = {
        "forks": start([sys.executable, str(ROOT / "tests/helpers/fork_commands.py"), str(place / "calls.json")]),
        "no such device": start(main, JAX_PLATFORMS="abacus"),
        "old jax": start(main, PYTHONPATH=f"{place}/old{os.pathsep}{ROOT}"),
    }
    yield processes
    for process in processes.values():
        process.kill()


@pytest.fixture(scope="module")
def results(started):
    """Returns {name: (exit code, stdout, stderr)}."""
    output, errors = started.pop("forks").communicate(timeout=300)
    assert output, errors[-1000:]
    found = dict(zip(COMMANDS, json.loads(output), strict=True))
    for name, process in started.items():
        output, errors = process.communicate(timeout=120)
        found[name] = process.returncode, output, errors
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_is_wrong_in_one_line(results, place, name):
    code, output, errors = results[name]
    assert code == 1
    assert re.fullmatch(f"sgpo_jax: .*{COMMANDS[name][-1]}.*\n", errors), errors
    assert "Traceback" not in output and not (place / "out").exists()


@pytest.mark.slow
def test_a_device_that_jax_does_not_have_is_named(results):
    code, _, errors = results["no such device"]
    line = r"sgpo_jax: JAX_PLATFORMS='abacus': JAX finds no such devices here \(.*\)\n"
    assert code == 1 and re.fullmatch(line, errors), errors


@pytest.mark.slow
def test_an_old_jax_is_named(results):
    code, _, errors = results["old jax"]
    assert code == 1
    (needed,) = re.findall(r'"jax>=([0-9.]+)"', (ROOT / "setup.py").read_text())
    sentence = f"sgpo_jax needs jax {needed} or newer; installed is 0.4.30)\n"
    assert errors.endswith(sentence) and errors.count("\n") == 1, errors


# ---- the flags alone

FLAGS = """
from sgpo_jax import cli
cli.start("nothing", cli.Command("", "builtins:print", announced=False))
"""
WRONG_FLAGS = {
    "a value that is no number": ("--config.rl.batch=3.5", r"--config\.rl\.batch=3\.5: invalid literal for int"),
    "None": ("--config.rl.batch=None", r"--config\.rl\.batch=None: invalid literal for int"),
    "no value": ("--config.rl.batch", r"Missing value for flag --config\.rl\.batch"),
    "a value for a section": ("--config.rl=3", r"--config\.rl=3: Failed to parse '3' as a ConfigDict"),
    "half a tuple": ("--config.stages=('sft',", r"--config\.stages=\('sft',: Error while parsing string"),
    "no switch": ("--config.eval.guided=maybe", r"--config\.eval\.guided=maybe: .*boolean"),
    "an unknown flag": ("--workdri=x", r"Unknown command line flag 'workdri'"),
    "a folder for a config": ("--config=configs", r"sgpo_jax: --config=configs: there is no such file"),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_flags_are_named(name):
    flag, message = WRONG_FLAGS[name]
    done = subprocess.run(
        [sys.executable, "-c", FLAGS, QUICKSTART, flag],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr.splitlines()[0]) and len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("error", [ValueError, ImportError, FloatingPointError, OSError])
def test_an_error_is_one_line_and_a_bug_is_not_hidden(error, monkeypatch):
    def start(raised):
        def run(flags):
            raise raised

        monkeypatch.setitem(sys.modules, "failing", SimpleNamespace(run=run))
        cli.start("fail", cli.Command("", "failing:run", config="", announced=False), [])

    with pytest.raises(SystemExit) as exit:
        start(error("two\n  lines"))
    assert exit.value.code == "sgpo_jax: two lines"
    with pytest.raises(ZeroDivisionError):
        start(ZeroDivisionError())


@pytest.mark.slow
def test_a_full_disk_ends_a_run_and_the_same_command_goes_on(tmp_path):
    tiny = {"model.hidden": 16, "model.heads": 2, "model.mlp": 32, "model.layers": 1, "sft.batch": 16, "sft.steps": 4,
            "sft.micro_batch": 8, "sft.validate_every": 2, "sft.validation_share": 0.1, "stages": "sft",
            "sft.train": "arithmetic:pretraining,count=200", "report_seconds": 0}  # fmt: skip
    arguments = [f"--config.{name}={value}" for name, value in tiny.items()]
    main = [sys.executable, "-m", "sgpo_jax.main", QUICKSTART, f"--workdir={tmp_path}", *arguments]
    limited = ["bash", "-c", 'ulimit -f 10; exec "$@"', "bash", *main]  # KiB of each file
    full = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert full.returncode == 1
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("sgpo_jax: ")]
    assert "File too large" in line and not list(tmp_path.glob("sft/checkpoints/[0-9]"))
    done = subprocess.run(main, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line)["step"] for line in (tmp_path / "sft.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path)
