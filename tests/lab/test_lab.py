"""Tests the lab: its cells, their configs, how it resumes, and its rows."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from helpers.configs import load
from helpers.paths import ROOT

from sgpo_jax import lab, methods
from sgpo_jax.config import ConfigDict
from sgpo_jax.lab import summary, workers
from sgpo_jax.runtime import preemption
from sgpo_jax.runtime.files import read_jsonl


@pytest.fixture
def config():
    """Returns configs/lab.py with a tiny model: two methods, two seeds and one other world, in this process."""
    config = load(ROOT / "configs" / "lab.py")
    config.model.update({"hidden": 16, "heads": 2, "mlp": 16, "layers": 1})
    config.sft.update({"batch": 16, "micro_batch": 16, "steps": 2, "validate_every": 2})
    config.rl.update({"batch": 8, "micro_batch": 8, "autonomous": 2, "guided": 1, "steps": 2, "max_new_tokens": 20})
    config.eval.update({"batch": 8, "max_new_tokens": 20, "guided": False})
    config.rl.reward = "helpers.reward_functions:even"  # an untrained model solves nothing
    with config.unlocked():
        config.lab.changes = ConfigDict({"base": sources(2), "four": sources(4)})
    config.lab.update({"methods": ("sft", "grpo", "sgpo"), "worlds": ("base", "four")})
    config.lab.world_methods = ("grpo", "sgpo")
    config.lab.update({"seeds": (0, 1), "rates": (0.5, 2.0), "tuning_seeds": (7,), "workers": 0})
    return config


def sources(competing):
    return {
        "sft": {"train": f"arithmetic:pretraining,count=200,competing={competing}"},
        "data": {"train": f"arithmetic:train,count=64,competing={competing}"},
        "eval": {"sets": {"heldout": {"source": f"arithmetic:eval,count=8,competing={competing}"}}},
    }


def test_the_config_of_a_cell(config):
    cell = lab.cell_config(config, lab.Cell("four", "grpo", 2.0, 5))
    assert cell.seed == 5 and cell.rl.guided == 0 and cell.rl.autonomous == 3
    assert cell.rl.learning_rate == pytest.approx(2 * config.rl.learning_rate)
    assert cell.data.train == "arithmetic:train,count=64,competing=4"
    assert cell.eval.sets.heldout.samples == config.eval.sets.heldout.samples
    assert config.seed == 0 and config.rl.guided == 1, "the lab's own config stays"


def test_all_cells_of_the_lab(config):
    tuning = lab.tuning_cells(config)
    pairs = [("base", "grpo"), ("base", "sgpo"), ("four", "grpo"), ("four", "sgpo")]
    assert [cell[:2] for cell in tuning[::2]] == pairs, "the warm-up has no rate to tune"
    assert tuning[0] == ("base", "grpo", 0.5, 7) and tuning[1] == ("base", "grpo", 2.0, 7) and len(tuning) == 8
    grid = lab.grid_cells(config, dict(zip(pairs, (0.5, 2.0, 2.0, 0.5), strict=True)))
    rates = {("base", "sft"): 1.0, ("base", "grpo"): 0.5, ("base", "sgpo"): 2.0}
    assert {c[:2]: c.rate for c in grid} == rates | {("four", "grpo"): 2.0, ("four", "sgpo"): 0.5}
    assert len(grid) == 3 * 2 + 2 * 2
    config.lab.rates = (1.0,)
    assert lab.tuning_cells(config) == []


@pytest.mark.parametrize("fast", [False, True])
def test_the_lab_of_the_config_file_can_run(fast):
    config = load(ROOT / "configs" / "lab.py")
    if fast:
        config.update(config.lab.fast)
    lab.check(config)
    grid = lab.grid_cells(config, {})
    published = [*methods.METHODS][: [*methods.METHODS].index("self_strategies")]
    assert {c.method for c in grid} == set(config.lab.methods if fast else published)
    every_world = config.lab.world_methods
    assert fast or config.lab.methods[1 : 1 + len(every_world)] == every_world, "they have the first colours"
    assert len({lab.digest(lab.cell_config(config, cell)) for cell in grid}) == len(grid)
    for method in set(config.lab.methods) - {"sft"}:
        rl = lab.cell_config(config, lab.Cell("base", method, 1.0, 0)).rl
        samples = rl.autonomous + (rl.guided if method != "hpt" else 0)
        assert samples == 12, method


def test_rows_know_what_their_warm_up_could_do():
    cell = {"world": "base", "rate": 1.0, "seed": 0}
    rows = [
        {**cell, "method": "sft", "accuracy": 0.25, "accuracy_guided": 0.75},
        {**cell, "method": "grpo", "rate": 2.0, "accuracy": 0.5, "accuracy_guided": 0.5},
        {**cell, "method": "grpo", "seed": 1, "accuracy": 0.5},  # its warm-up is not there
    ]
    before = {"before": 0.25, "before_guided": 0.75}
    assert summary.with_before(rows) == [rows[0] | before, rows[1] | before]


def test_the_stored_results_belong_to_the_config_as_it_is():
    """New fields change no digest at their defaults, so a lab that was stored resumes."""
    config = load(ROOT / "configs" / "lab.py")
    stored = ROOT / "benchmarks" / "lab"
    every = {"results": 40, "anchored": 5, "rules": 20, "new_worlds": 20}  # each so many rows
    for row in (row for name, step in every.items() for row in read_jsonl(stored / f"{name}.jsonl")[::step]):
        assert lab.digest(lab.cell_config(config, lab.Cell.from_row(row))) == row["config"]


def test_the_world_of_own_strategies_has_as_many_other_rows_as_the_first():
    config = load(ROOT / "configs" / "lab.py")
    config.lab.update({"worlds": ("self-written",), "methods": ("sft", "grpo", "sgpo", "self_strategies")})
    lab.check(config)
    cell = lab.cell_config(config, lab.Cell("self-written", "self_strategies", 2.0, 0))
    assert cell.rl.guide == "self" and cell.rl.guided == 4
    sources = [arithmetic_options(c.sft.train) for c in (config, cell)]
    share = float(sources[1].pop("writing"))
    assert int(sources[1].pop("count")) * (1 - share) == int(sources[0].pop("count"))
    assert sources[1] == sources[0]
    assert cell.sft.steps * (1 - share) == pytest.approx(config.sft.steps, abs=1)


def arithmetic_options(source):
    return dict(item.split("=") for item in source.split(",")[1:])


@pytest.mark.slow
def test_the_lab_of_logic_can_run():
    pytest.importorskip("reasoning_gym", reason="needs the extra 'gym'")
    config = load(ROOT / "configs" / "lab_logic.py")
    lab.check(config)
    assert {cell.method for cell in lab.grid_cells(config, {})} == {"sft", "grpo", "sgpo"}
    assert len({cell.rate for cell in lab.tuning_cells(config)}) >= 3 and len(config.lab.seeds) >= 5
    sources = (config.data.train, config.sft.train, config.eval.sets.heldout.source)
    assert all("knights_knaves" in source for source in sources) and "split=eval" in sources[2]


def test_the_lab_of_a_real_model_can_run():
    pytest.importorskip("reasoning_gym", reason="needs the extra 'gym'")
    config = load(ROOT / "configs" / "lab_smollm2.py")
    lab.check(config)
    cells = lab.grid_cells(config, {})
    assert {cell.method for cell in cells} == {"sft", "grpo", "sgpo"} and len({cell.seed for cell in cells}) == 3
    assert "split=eval" in config.eval.sets.heldout.source and "split" not in config.data.train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("sgpo", "ppo")}, r"config.lab.methods=\('sgpo', 'ppo'\): must be one or more of sgpo, sft"),
        ({"methods": ()}, r"config.lab.methods=\(\): must be one or more of"),
        ({"seeds": (1, 1)}, r"config.lab.seeds=\(1, 1\): must be different seeds"),
        ({"seeds": (-1, 1)}, r"config.lab.seeds=\(-1, 1\): must be different seeds"),
        ({"tuning_seeds": (1,)}, r"config.lab.tuning_seeds=\(1,\): must be different from lab.seeds, .* has \{1\}"),
        ({"rates": (0.0, 1.0)}, r"config.lab.rates=\(0.0, 1.0\): must be different numbers above 0"),
        ({"workers": -1}, "config.lab.workers=-1: must be at least 0"),
        ({"worlds": ("mars",)}, r"config.lab.worlds=\('mars',\): must be one or more of \['base', 'four'\]"),
        ({"changes": {"four": {"data": {"train": ""}}}}, "config.data.train='': must be a source"),
    ],
)
def test_a_lab_that_cannot_run_is_refused(config, changes, message):
    lab.check(config)
    config.lab.update(changes)
    with pytest.raises(ValueError, match=message):
        lab.check(config)


@pytest.mark.parametrize("which", ["data", "sft", "eval"])
def test_a_world_whose_problems_cannot_be_read_is_refused(config, which):
    source = "arithmetic:train,count=800,stages=1"
    change = {"train": source} if which != "eval" else {"sets": {"heldout": {"source": source}}}
    with config.unlocked():
        config.lab.changes.four.update({which: change})
    with pytest.raises(ValueError, match="count is 800; allowed: at most"):
        lab.check(config)


def test_a_world_that_changes_what_is_not_there_is_refused(config):
    with config.unlocked():
        config.lab.changes.four.rl = ConfigDict({"bacth": 3})
    with pytest.raises(ValueError, match=r"config.lab.changes\['four'\]: .*bacth"):
        lab.check(config)


def recount(workdir, row):
    """Accuracy from the responses on disk."""
    folder = workdir / row["world"] / f"{row['method']}@{row['rate']:g}" / f"seed{row['seed']}"
    (path,) = (folder / "eval").glob("heldout_unguided_*.jsonl")
    return np.mean([line["reward"] for line in read_jsonl(path)])


def timeless(path):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_jsonl(path)]


def test_solved_groups_are_those_of_the_last_tenth_of_the_steps(tmp_path):
    steps = [{"step": step, "solved": share, "entropy": 0.5} for step, share in enumerate([0.0] * 18 + [0.25, 0.75])]
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    assert workers.training_means(tmp_path / "rl.jsonl") == {"mean_entropy": 0.5, "pass_at_group": 0.5}


@pytest.mark.slow
def test_a_lab_from_beginning_to_end(config, tmp_path, capsys, monkeypatch):
    """All cells, tables and figures; then again with nothing, one cell, and another config to do."""
    config.lab.update({"rates": (1.0,), "seeds": (1,)})
    lab.run(config, tmp_path)
    printed = capsys.readouterr().out
    assert "lab: 6 cells, 6 to run" in printed
    for title in ("Table 1, methods at equal samples", "The paper's claims", "Where distillation helps"):
        assert title in printed and title in (tmp_path / "tables.txt").read_text()
    assert (tmp_path / "dynamics.png").stat().st_size > 0 and (tmp_path / "worlds.png").stat().st_size > 0
    rows = read_jsonl(tmp_path / "results.jsonl")
    cells = {(row["world"], row["method"], row["seed"]) for row in rows}
    assert cells == {(world, method, 1) for world in ("base", "four") for method in ("sft", "grpo", "sgpo")}
    for row in rows:
        assert row["accuracy"] == row["sets"]["heldout"] == pytest.approx(recount(tmp_path, row))
        assert ("mean_reward_auto" in row) == (row["method"] != "sft") and ("failed" not in row)
        if row["method"] != "sft":
            steps = read_jsonl(tmp_path / row["world"] / f"{row['method']}@1" / f"seed{row['seed']}" / "rl.jsonl")
            assert row["mean_entropy"] == pytest.approx(np.mean([step["entropy"] for step in steps]))
            assert row["pass_at_group"] == steps[-1]["solved"], "a tenth of fewer than ten steps is the last one"
    assert len({row["accuracy"] for row in rows}) > 2, "there is something to compare"
    first = timeless(tmp_path / "results.jsonl")

    ran = []
    real = workers.run_cell

    def run_cell(config, cell, workdir):
        ran.append(str(cell))
        return real(config, cell, workdir)

    monkeypatch.setattr(workers, "run_cell", run_cell)
    lab.run(config, tmp_path)
    assert ran == [] and "0 to run" in capsys.readouterr().out
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    torn = "\n".join(line for line in lines if not ('"sgpo"' in line and '"four"' in line))
    (tmp_path / "results.jsonl").write_text(torn + '\n{"world": "four", "meth')
    lab.run(config, tmp_path)
    assert ran == ["four/sgpo@1/seed1"]
    again = timeless(tmp_path / "results.jsonl")
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, first)), "the same seed gives the same row"

    config.rl.clip_high = 0.4
    changed = r"2 of 2 cells failed, the first is base/sft@1/seed1: .*config\.rl\.clip_high=0\.4"
    with pytest.raises(ValueError, match=changed):
        lab.run(config, tmp_path)


@pytest.mark.slow
def test_a_cell_that_fails_does_not_cost_the_others(config, tmp_path, monkeypatch):
    config.lab.update({"rates": (1.0,), "worlds": ("base",), "methods": ("sgpo",), "seeds": (0, 1)})
    real = workers.rl.train

    def train(run, *others):
        if run.config.seed == 0:
            raise RuntimeError("out of memory")
        return real(run, *others)

    monkeypatch.setattr(workers.rl, "train", train)
    message = "1 of 2 cells failed, the first is base/sgpo@1/seed0: RuntimeError: out of memory"
    with pytest.raises(ValueError, match=message):
        lab.run(config, tmp_path)
    assert [(row["method"], row["seed"]) for row in read_jsonl(tmp_path / "results.jsonl")] == [
        ("sft", 0), ("sft", 1), ("sgpo", 1),
    ]  # fmt: skip

    def diverge(*arguments):
        raise FloatingPointError("step 2: the gradient was not finite")

    monkeypatch.setattr(workers.rl, "train", diverge)
    lab.run(config, tmp_path)
    (row,) = [r for r in read_jsonl(tmp_path / "results.jsonl") if (r["method"], r["seed"]) == ("sgpo", 0)]
    assert row["accuracy"] == 0.0 and row["failed"] == "step 2: the gradient was not finite"
    assert "1 method · 2 seeds · 1 world" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_methods_begin_with_the_warm_up_of_their_world_and_seed(config, tmp_path, monkeypatch):
    config.lab.update({"rates": (1.0,), "worlds": ("base",), "methods": ("grpo", "sgpo"), "seeds": (0, 1)})
    begun = {}

    def train(run, initial, *_):
        seed, guided = run.config.seed, run.config.rl.guided
        begun[seed, guided] = jax.device_get(initial())
        warm_up = dataclasses.replace(run, workdir=tmp_path / f"base/sft@1/seed{seed}")
        saved = workers.stage.best_params(warm_up, "sft")
        jax.tree.map(np.testing.assert_array_equal, begun[seed, guided], jax.device_get(saved))

    monkeypatch.setattr(workers.rl, "train", train)
    lab.run(config, tmp_path)
    assert set(begun) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    kernels = [begun[seed, 1]["embed"]["embedding"] for seed in (0, 1)]
    assert not np.array_equal(*kernels)


@pytest.mark.slow
def test_a_warm_up_that_left_only_its_row_is_run_again(config, tmp_path, monkeypatch):
    """Rows are copied to another folder, without the folders of the runs, and a method is added."""
    config.lab.update({"worlds": ("base",), "methods": ("sft",), "seeds": (0,), "rates": (1.0,)})
    lab.run(config, tmp_path / "first")
    config.lab.methods = ("sft", "sgpo")
    (tmp_path / "second").mkdir()
    rows = (tmp_path / "first" / "results.jsonl").read_text()
    (tmp_path / "second" / "results.jsonl").write_text(rows)
    for folder in ("first", "second"):
        lab.run(config, tmp_path / folder)
    found = [
        {(row["world"], row["method"], row["rate"], row["seed"]): row["accuracy"] for row in read_jsonl(file)}
        for file in (tmp_path / "first/results.jsonl", tmp_path / "second/results.jsonl")
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    assert (tmp_path / "second" / "base" / "sft@1" / "seed0" / "sft" / "checkpoints").is_dir()

    # The same, where the warm-up that is run again is stopped, and has a checkpoint of its first step.
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "results.jsonl").write_text(rows)
    stopped = tmp_path / "third/base/sft@1/seed0"
    with monkeypatch.context() as patched:
        patched.setattr(preemption, "requested", lambda: signal.SIGTERM * (stopped / "sft.jsonl").is_file())
        with pytest.raises(ValueError, match="stopped by SIGTERM"):
            lab.run(config, tmp_path / "third")
    assert [path.name for path in (stopped / "sft/checkpoints").iterdir() if path.is_dir()] == ["1"]
    lab.run(config, tmp_path / "third")
    assert timeless(tmp_path / "third/results.jsonl")[-1] == timeless(tmp_path / "first/results.jsonl")[-1]

    cell = lab.Cell("base", "sgpo", 1.0, 5)
    with pytest.raises(ValueError, match=r"base/sft@1/seed5 has no finished warm-up, with which base/sgpo@1/seed5"):
        lab.run_cell(lab.cell_config(config, cell), cell, tmp_path / "first")


@pytest.mark.slow
def test_several_processes_give_the_rows_of_one(config, tmp_path, capsys):
    config.lab.update({"rates": (0.5, 2.0), "worlds": ("base",), "methods": ("grpo",), "seeds": (0,)})
    lab.run(config, tmp_path / "one")
    capsys.readouterr()
    lab.run(config, tmp_path / "one")
    assert "lab: 5 cells, 0 to run" in capsys.readouterr().out, "with the rates that were chosen"
    config.lab.workers = 2
    lab.run(config, tmp_path / "two")
    one, two = (timeless(tmp_path / name / "results.jsonl") for name in ("one", "two"))
    assert len(one) == 5 and sorted(map(json.dumps, one)) == sorted(map(json.dumps, two))


@pytest.mark.parametrize(
    ("gpus", "shares"),
    [
        ([], [(), (), ()]),
        (["0", "1", "2", "3"], [("0",), ("1",), ("2",)]),
        (["4", "7"], [("4", "0.375"), ("7",), ("4", "0.375")]),
        (["GPU-a"], [("GPU-a", "0.250")] * 3),
    ],
)
def test_three_workers_share_the_gpus_of_a_host(monkeypatch, gpus, shares):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    names = "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    expected = [dict(zip(names, share, strict=False)) for share in shares]
    assert [workers.gpu_share(i, 3, gpus) for i in range(3)] == expected


def test_workers_share_what_the_user_leaves_them(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert workers.gpu_share(0, 2, ["0"])["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.250"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    assert workers.host_gpus() == ["1", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.host_gpus() == []
