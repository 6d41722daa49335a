"""Keeps docs/results/plans.md true to the plans for GPUs in benchmarks/plans, and those to the configs."""

import json
import runpy

import numpy as np
import pytest
from helpers.paths import ROOT

from sgpo_jax import config as configs
from sgpo_jax.plan import report
from sgpo_jax.plan.hardware import GIB
from sgpo_jax.plan.planner import without_files

PAGE = (ROOT / "docs/results/plans.md").read_text()
MODELS = {"qwen1p5b": "Qwen2.5-1.5B", "qwen7b": "Qwen2.5-7B", "llama8b": "Llama-3.1-8B"}
CARDS = {"h100x8": "h100:8", "h100x32": "h100:4x8"}
# A plan that is not made yet is not in the table either.
STORED = [(m, c) for m in MODELS for c in CARDS if (ROOT / "benchmarks/plans" / f"{m}_{c}.json").is_file()]


def plan(model, cards):
    return json.loads((ROOT / "benchmarks/plans" / f"{model}_{cards}.json").read_text())


def planned_fields(stored):
    """Returns the fields of a stored plan; those that are newer have their defaults."""
    return configs.flat(configs.to_dict(configs.base())) | configs.flat(stored["config"])


@pytest.mark.parametrize(("model", "cards"), STORED)
def test_the_paper_models_fit(model, cards):
    stored = plan(model, cards)
    assert stored["topology"] == CARDS[cards] and stored["fits"]
    assert stored["assumed"]["memory_share"] == 0.75
    # Attention holds no scores of all tokens with all tokens.
    for program in stored["programs"].values():
        assert not any(array["array"].count("17408") > 1 for array in program["largest"])


@pytest.mark.parametrize(("model", "cards"), STORED)
def test_a_plan_is_of_the_preset_in_the_config(model, cards):
    config = runpy.run_path(str(ROOT / "configs" / f"{model}.py"))["get_config"](cards)
    assert configs.flat(configs.to_dict(without_files(config))) == planned_fields(plan(model, cards))


@pytest.mark.parametrize(
    ("model", "name", "chips", "changes"),
    [
        ("qwen7b", "h100x1", "h100:1", {}), ("qwen1p5b", "rtx4090x1", "rtx4090:1", {}),
        ("qwen7b", "v5e_2x4", "v5e:2x4", {"mesh.tensor": 4, "rl.slots": 24}),
        ("qwen7b", "v6e_2x2", "v6e:2x2", {"mesh.tensor": 4, "rl.slots": 24}),
    ],
)  # fmt: skip
def test_the_plans_of_adapters_are_of_their_preset_and_in_their_table(model, name, chips, changes):
    stored = plan(f"{model}_lora", name)
    config = runpy.run_path(str(ROOT / f"configs/{model}.py"))["get_config"]("lora")
    config.update_from_flattened_dict(changes)
    assert configs.flat(configs.to_dict(without_files(config))) == planned_fields(stored)
    assert stored["topology"] == chips and stored["fits"]
    needed = [stored["programs"][name]["hbm"]["needed"] / GIB for name in ("SFT update", "update", "rollout")]
    needed.append(max(p["hbm"]["needed"] for p in stored["programs"].values() if p["stage"] == "eval") / GIB)
    hours = (stored["hours"][stage] for stage in ("sft", "rl", "eval"))
    cells = [
        chips, f"{stored['mesh']['fsdp']} x {stored['mesh']['tensor']}", ", ".join(f"{x:.1f}" for x in needed),
        f"{stored['programs']['update']['hbm']['limit'] / GIB:.4g}",
        ", ".join(f"{bounds['least']:,.1f} to {bounds['most']:,.1f}" for bounds in hours),
    ]  # fmt: skip
    assert "| " + " | ".join(cells) + " |" in (ROOT / "docs/lora.md").read_text()


LONG = sorted((ROOT / "benchmarks/plans").glob("*_32k_*.json"))


@pytest.mark.parametrize("path", LONG, ids=lambda path: path.stem)
def test_the_plans_of_long_responses_are_in_their_table_with_their_command(path):
    stored = json.loads(path.read_text())
    assert stored["fits"] and stored["mesh"]["context"] > 1
    config = runpy.run_path(str(ROOT / "configs/qwen7b.py"))["get_config"]()
    usual, fields = configs.flat(configs.to_dict(without_files(config))), planned_fields(stored)
    assert fields["rl.max_new_tokens"] == 32768
    command = next(line for line in PAGE.splitlines() if path.name in line)
    flags = {part.partition("=")[0]: part.partition("=")[2].strip('"') for part in command.split() if "--" in part}
    changes = {f"--config.{name}": value for name, value in fields.items() if value != usual[name]}
    shown = {name: f"({value[0]},)" if isinstance(value, list) else str(value) for name, value in changes.items()}
    assert {name: flags[name] for name in flags if name.startswith("--config.")} == shown
    assert flags["--topology"] == stored["topology"]
    sizes = (stored["programs"][name]["hbm"]["needed"] / GIB for name in ("SFT update", "update", "rollout"))
    hours = (stored["hours"][stage] for stage in ("sft", "rl", "eval"))
    cells = [
        stored["topology"], " x ".join(str(stored["mesh"][axis]) for axis in ("fsdp", "context", "tensor")),
        f"{', '.join(f'{size:.1f}' for size in sizes)} of {stored['programs']['update']['hbm']['limit'] / GIB:.4g}",
        ", ".join(f"{bounds['least']:.1f} to {bounds['most']:.1f}" for bounds in hours),
        " to ".join(f"{value:,.0f}" for value in stored["dollars"].values()),
    ]  # fmt: skip
    assert "| " + " | ".join(cells) + " |" in PAGE.splitlines()


def test_the_table_of_memory_has_every_plan():
    """Of adapters too."""
    expected = set()
    for path in (ROOT / "benchmarks/plans").glob("*.json"):
        stored = json.loads(path.read_text())
        rank, programs = planned_fields(stored)["lora.rank"], stored["programs"]
        gib = [programs["update"]["hbm"]["needed"], programs["rollout"]["hbm"]["needed"]]
        cells = [
            MODELS[path.stem.split("_")[0]],
            (f"adapters, r = {rank}" if rank else "all parameters") + ", responses of 32K" * ("32k" in path.stem),
            stored["topology"],
            *(f"{number / GIB:.1f}" for number in gib), f"{programs['update']['hbm']['limit'] / GIB:.4g}",
        ]  # fmt: skip
        expected.add("| " + " | ".join(cells) + " |")
    page = (ROOT / "docs/models.md").read_text().splitlines()
    start = page.index("| model | trained | chips | update | rollout | limit |")
    assert set(page[start + 2 : start + 2 + len(expected)]) == expected and not page[start + 2 + len(expected)]


def test_no_other_plans_are_in_the_table():
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and "| h100:" in line]
    assert len(rows) == len(STORED)


@pytest.mark.parametrize(("model", "cards"), STORED)
def test_the_table_has_the_figures_of_the_plan(model, cards):
    stored = plan(model, cards)
    most = max(program["hbm"]["needed"] for program in stored["programs"].values()) / GIB
    hours = [stored["hours"][stage] for stage in ("sft", "rl", "eval")]
    cells = [
        MODELS[model], CARDS[cards], f"{stored['mesh']['fsdp']} x {stored['mesh']['tensor']}", f"{most:.1f} of 59.3",
        ", ".join(f"{bounds['least']:.1f} to {bounds['most']:.1f}" for bounds in hours),
        " to ".join(f"{value:,.0f}" for value in stored["dollars"].values()),
    ]  # fmt: skip
    assert "| " + " | ".join(cells) + " |" in PAGE


def test_hours_are_shown_at_a_lower_share_of_the_bandwidth_too(capsys):
    stored = plan("qwen7b", "v5p_4x4x4")
    report.show_hours(stored)
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.strip("│ ").startswith("dollars"))
    shown = [float(cell.replace(",", "")) for cell in line.strip("│ ").split("│")[1:]]
    # The 0.65 of the plan becomes 0.4; a phase takes its slowest part at least, and all of them at most.
    expected = []
    for share in (0.65, 0.4):
        for bound in (max, sum):
            calls = (
                program["calls"] * bound({**phase["seconds"], "hbm": phase["seconds"]["hbm"] * 0.65 / share}.values())
                for program in stored["programs"].values() for phase in program["phases"].values()
            )  # fmt: skip
            expected.append(sum(calls) / 3600 * stored["chips"] * stored["assumed"]["chip"]["price"])
    np.testing.assert_allclose(shown, expected, rtol=1e-3)
    assert "HBM at 65 %" in printed and "HBM at 40 %" in printed
