"""SIGKILL in every phase of a run and of an extraction: the same command resumes and ends with the same results.

SGPO_KILLS=30 makes 30 kills: those that are always tried, and others at random moments of random phases.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections import Counter

import jax
import numpy as np
import pytest
from helpers.chat_server import WORDS, ChatServer, completion, helpful, problems, stage_of, strategy
from helpers.runs import ROOT, TIMES, assert_same_run, command, environment, parameters, rows

from sgpo_jax.runtime.files import read_jsonl

# In the order in which a run comes to them: [phase, its number, seconds in it].
KILLS = [
    ["start-up", 1, 0.5],
    ["compilation", 3, 0.02],
    ["SFT update", 5, 0.001],
    ["checkpoint", 1, 0.0],
    ["validation", 1, 0.01],
    ["rollout", 5, 0.02],
    ["grading", 2, 0.001],
    ["evaluation", 1, 0.2],
    ["RL update", 4, 0.001],
    ["rollback", 1, 60],
    ["rolled back", 1, 60],
    ["checkpoint", 2, 0.01],
    ["part of an evaluation", 3, 60],
]
# SFT in 8 steps, RL in 8; what is sampled for steps 6 and 7 looks collapsed, once.
WORLD = {"monitor__window": 2, "monitor__most_truncated": 0.5, "monitor__action": "rollback", "checkpoint__keep": 4}
SICK = [5, 6]


def plan(more):
    """Returns `KILLS` and `more` others at random moments."""
    chosen, order = random.Random(0), {phase: place for place, (phase, *_) in enumerate(KILLS)}
    others = []
    for _ in range(more):
        phase = chosen.choice([*order])
        often = {"rollback": 1, "rolled back": 1, "validation": 2}.get(phase, 4)  # so often any run comes to it
        long = 20 if phase == "start-up" else 1
        others.append([phase, chosen.randint(1, often), long * chosen.expovariate(5)])
    return sorted(KILLS + others, key=lambda kill: order[kill[0]]) if more else KILLS


def attempts(folder, *plans):
    """Returns the results of `helpers.kill_in`: of each plan, one for each kill and one for the run after them."""
    file = folder / "plan.json"
    file.write_text(json.dumps(plans))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/kill_in.py"), str(file)], env=environment() | cache, cwd=ROOT,
        capture_output=True, text=True, timeout=sum(600 + 120 * len(one["kills"]) for one in plans),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    for one in results:
        assert one[-1][0] == 0, (one[-1], (folder / "plan.output").read_text()[-3000:])
    return results


def plan_of(workdir, module, arguments, kills=(), sick=()):
    """Returns a plan for `attempts`."""
    return {"module": module, "arguments": arguments, "folder": str(workdir), "kills": kills, "sick": sick}


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_as_without(tmp_path):
    undisturbed, workdir, kills = tmp_path / "undisturbed", tmp_path / "run", plan(extra())

    def run(workdir, kills):
        plan = plan_of(workdir, "sgpo_jax.main", command(workdir, **WORLD)[3:], kills, SICK)
        return attempts(tmp_path, plan)[0]

    def assert_same():
        assert_same_run(undisturbed, workdir)
        for name in ("rl.rolled_back.jsonl", "rl/rollbacks.json"):
            assert without_times(workdir / name) == without_times(undisturbed / name)
        assert len(read_jsonl(workdir / "rl.rolled_back.jsonl")) == 3, "steps 5 to 7"

    run(undisturbed, [])
    assert json.loads((undisturbed / "rl" / "rollbacks.json").read_text())[0]["at"] == 7
    cut, count = 0, 0
    while True:
        results = run(workdir, kills[count:])
        assert_same()
        print(*zip(kills[count:], results, strict=False), sep="\n")
        cut += sum(bool(names) for (phase, *_), (_, names, _) in zip(kills[count:], results, strict=False)
                   if phase == "checkpoint")  # fmt: skip
        count += len(results) - 1
        if count == len(kills):
            break
        assert len(results) > 1, f"no run comes to {kills[count]}"
        shutil.rmtree(workdir)  # it ended before it came to the next one: begin anew
    assert cut, "one of them in the middle of writing"


@pytest.mark.slow
def test_a_run_whose_responses_go_on_ends_as_without_kills(tmp_path):
    """They come after checkpoints: what goes on after the later steps is there already, and is written anew."""
    kills = [["rollout", 2, 0.02], ["checkpoint", 1, 0.0]]
    fields = {"stages": "('rl',)", "rl__eval_every": 0, "rl__learning_rate": 1e-2, "rl__draft": 4, "rl__slots": 4,
              "rl__carry_over": 0.5, "rl__importance": "token"}  # fmt: skip
    plans = [plan_of(tmp_path / name, "sgpo_jax.main", command(tmp_path / name, **fields)[3:], of)
             for name, of in (("undisturbed", []), ("run", kills))]  # fmt: skip
    _, killed = attempts(tmp_path, *plans)
    assert [code for code, *_ in killed] == [-9] * len(kills) + [0]
    undisturbed, found = (rows(tmp_path / name, "rl") for name in ("undisturbed", "run"))
    assert undisturbed == found and len(found) == 8 and max(row["token_age_max"] for row in found) >= 1
    states = [parameters(tmp_path / name, "rl", 8) for name in ("undisturbed", "run")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def extra():
    return max(int(os.environ.get("SGPO_KILLS", "0")) - len(KILLS) - len(EXTRACTION), 0)


def without_times(path):
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


EXTRACTION = [["extraction", 5, 0.0], ["extraction", 12, 60], ["extraction", 9, 0.02]]


@pytest.mark.slow
def test_an_extraction_killed_again_and_again_ends_as_without_and_pays_for_nothing_twice(tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="needs the extra 'extract'")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    rows = problems(10, solved=False)
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def same_again(prompt, body, headers, number):
        if stage_of(prompt) == "strategy":
            return completion(strategy(WORDS[zlib.crc32(prompt.encode()) % 10]))._replace(delay=0.01)
        return helpful(prompt, body, headers, number)._replace(delay=0.01)

    found = []
    for kills in ([], EXTRACTION):
        workdir = tmp_path / f"work{len(kills)}"
        with ChatServer(same_again) as server:
            fields = {"source": tmp_path / "problems.jsonl", "concurrency": 3, "strong.base_url": server.url,
                      "strong.name": "big"}  # fmt: skip
            flags = [f"--config.extract.{name}={value}" for name, value in fields.items()]
            flags = [f"--config={ROOT / 'configs/strategies.py'}", f"--workdir={workdir}", *flags]
            results = attempts(tmp_path, plan_of(workdir, "sgpo_jax.strategies", flags, kills))[0]
            assert len(results) == len(kills) + 1
            asked = Counter(body["messages"][0]["content"] for body in server.requests)
        replies = [record for record in read_jsonl(workdir / "extraction.jsonl") if record["kind"] == "reply"]
        assert len({(r["id"], r["stage"], r["index"], r["prompt"]) for r in replies}) == len(replies) == 70
        assert asked.total() <= 70 + 3 * len(kills), "at most those under way are asked for again"
        found.append((workdir / "strategies.jsonl").read_text())
    assert found[0] == found[1] and len(found[0].splitlines()) == 10
