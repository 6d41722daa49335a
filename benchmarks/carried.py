"""Counts the passes of a rollout where a step does not wait for its longest responses (rl.carry_over), by simulation.

    python benchmarks/carried.py
    python benchmarks/carried.py --mean=2000 --alike=1.0 --fed=4
    python benchmarks/carried.py --runs=RUN,RUN     # compares runs with rl.draft, with rl.carry_over and without

All responses in flight decode at once, a token a pass. A response that goes on feeds `fed` known tokens in a pass until
it is where it was. Lengths are exponential and cut at the limit, as in a plan; with `alike` above 0 the means of the
problems differ, lognormally, so that the long responses are those of a few problems. Nothing is run on a device: a pass
is taken to cost the same whatever it does, as long as the weights take longer to read than the slots to compute.

Runs are compared at equal steps, which is at equal samples, and at equal slot-steps: passes of a slot, idle or not.
"""

import json
from pathlib import Path

import common
import numpy as np

from sgpo_jax.runtime import files, tables

STEPS = 60  # of which the first fifth is left out


def passes(lengths: np.ndarray, batch: int, extra: int, most: int, fed: float) -> np.ndarray:
    """Returns the passes of every step.

    Args:
      lengths: `[N,G]` tokens of the responses to each problem, in the order of the problems.
      batch, extra, most: B, problems beyond B, and rl.carry_most.
      fed: known tokens of a response in a pass.
    """
    known, first, flying, taken, counts = np.zeros_like(lengths), {}, [], 0, []
    while taken + batch + extra - len(flying) <= len(lengths):
        position, new = len(counts), range(taken, taken + batch + extra - len(flying))
        first |= dict.fromkeys(new, position)
        flying, taken = [*flying, *new], taken + len(new)
        again = np.where(known[flying] < lengths[flying], np.ceil(known[flying] / fed), 0)
        needed = (again + lengths[flying] - known[flying]).max(axis=1)
        due = [position - first[n] >= most for n in flying]
        end = max(np.sort(needed)[batch - 1], needed[due].max(initial=0))
        known[flying] = np.clip(known[flying] + end - again, known[flying], lengths[flying])
        trained = [n for n, at in zip(flying, needed, strict=True) if at <= end][:batch]
        flying = [n for n in flying if n not in trained]
        counts.append(end)
    return np.array(counts)


def compare(folders: list[Path], window: int) -> list[list[str]]:
    """Returns a line for each run: steps, slot-steps, and the mean reward of the autonomous group over some steps.

    Args:
      folders: of runs with drafts, which count passes.
      window: W, steps over which rewards are averaged: the last ones, then those up to the slot-steps of the cheapest.
    """
    runs = []
    for folder in folders:
        rl, rows = json.loads((folder / "config.json").read_text())["rl"], files.read_jsonl(folder / "rl.jsonl")
        if not rl["draft"]:
            raise SystemExit(f"{folder}: rl.draft is 0, and only runs with drafts count passes")
        flying = np.full(len(rows), rl["batch"] + round(rl.get("carry_over", 0) * rl["batch"]))
        flying[-1] = rl["batch"]
        responses = flying * (rl["autonomous"] + rl["guided"] * (rl["guide"] != "demonstration"))
        spent = responses * [row["passes"] / row["slots_used"] for row in rows]
        runs.append((np.cumsum(spent), np.array([row["reward_auto"] for row in rows])))
    least = min(spent[-1] for spent, _ in runs)
    lines = []
    for folder, (spent, rewards) in zip(folders, runs, strict=True):
        at = int(np.searchsorted(spent, least, side="right"))
        means = (rewards[max(end - window, 0) : end].mean() for end in (len(rewards), at))
        lines.append([str(folder), str(len(rewards)), f"{spent[-1]:.3g}", *(f"{mean:.3f}" for mean in means), str(at)])
    return lines


def main() -> None:
    parser = common.arguments(
        "Passes of a rollout with rl.carry_over, simulated.",
        batch=(128, "problems of a step"), group=(12, "responses to a problem"), mean=(4096.0, "tokens of a response"),
        limit=(16384, "most tokens of a response"), alike=(0.5, "deviation of the logarithm of the problems' means"),
        fed=(2.0, "known tokens of a response in a pass"), most=("1,2,4", "rl.carry_most, separated by commas"),
        shares=("0.125,0.25,0.5,1.0", "rl.carry_over, separated by commas"),
    )  # fmt: skip
    parser.add_argument("--runs", default="", help="folders of runs to compare, separated by commas")
    parser.add_argument("--window", type=int, default=10, help="steps over which the rewards of runs are averaged")
    flags = parser.parse_args()
    if flags.runs:
        lines = compare([Path(name) for name in flags.runs.split(",")], flags.window)
        common.save(flags.json, __file__, flags=vars(flags), runs=lines)
        columns = ["run", "steps", "slot-steps", "reward, last steps", "at equal slot-steps", "after steps"]
        tables.table("Autonomous reward", columns, lines)
        return
    rng, rows = np.random.default_rng(0), []
    means = np.exp(flags.alike * rng.standard_normal(((STEPS + 1) * flags.batch, 1)) - flags.alike**2 / 2) * flags.mean
    drawn = rng.exponential(means, (len(means), flags.group))
    lengths = np.clip(np.ceil(drawn), 1, flags.limit)
    waits = lengths.reshape(-1, flags.batch * flags.group).max(axis=1)[STEPS // 5 : STEPS].mean()
    for share in map(float, flags.shares.split(",")):
        for most in map(int, flags.most.split(",")):
            found = passes(lengths, flags.batch, round(share * flags.batch), most, flags.fed)[STEPS // 5 :].mean()
            rows.append([f"{share:g}", str(most), f"{found:.0f}", f"{found / waits:.2f}"])
    print(f"mean length {lengths.mean():.0f}; a step that waits takes {waits:.0f} passes")
    common.save(flags.json, __file__, flags=vars(flags), waits=float(waits), rows=rows)
    columns = ["rl.carry_over", "rl.carry_most", "passes of a step", "of one that waits"]
    tables.table("Simulated rollouts", columns, rows)


if __name__ == "__main__":
    main()
