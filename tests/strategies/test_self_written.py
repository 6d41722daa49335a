"""Strategies that the student writes: which response is shown, what is refused, and that a kill changes nothing."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers.configs import load
from helpers.paths import ROOT

from sgpo_jax import data, methods, rewards, sharding
from sgpo_jax.commands import train
from sgpo_jax.policy import Run, generation, tokenizer
from sgpo_jax.policy.generation import Graded
from sgpo_jax.rollout import STOP, Rollout
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.strategies import parsing, prompts, self_written
from sgpo_jax.training import stage

STRATEGY = "Problem type: percentages. Strategy: one quantity is split. Steps: (a) find the part (b) find the rest"
SOLUTION = "30 % of 70 is 21 and 70 - 21 = 49. \\boxed{49}"


def graded(lengths, values):
    """Returns the graded responses to one problem, with these lengths and rewards."""
    count = len(lengths)
    nothing = np.zeros((1, count, 9), np.int32)
    rollout = Rollout(nothing, nothing, np.array([lengths]), nothing[..., 0])
    texts = [[f"response {i}" for i in range(count)]]
    return Graded(rollout, texts, [[rewards.Verdict(0.0, "wrong", "")] * count], np.array([values], np.float32))


@pytest.mark.parametrize(
    ("lengths", "values", "shown"),
    [
        ([5, 4, 3], [1, 1, 0], 1),
        ([5, 4, 4], [1, 1, 1], 1),
        ([2, 7], [0.5, 1.0], 1),  # a reward below 1 is not a correct response
        ([2, 7], [0, 0], None),
    ],
)
def test_the_shortest_correct_response_is_shown(lengths, values, shown):
    found = self_written.shortest_correct(graded(lengths, values), 0)
    assert found == (None if shown is None else f"response {shown}")


@pytest.mark.parametrize(
    ("reply", "finish", "reason"),
    [
        (STRATEGY, "stop", ""),
        (STRATEGY, "length", "truncated"),
        ("find the part, then the rest", "stop", "structure"),
        (STRATEGY.replace("rest", "rest, 49"), "stop", "leak_answer"),
        (STRATEGY.replace("part", "part, 21"), "stop", "leak_value"),
    ],
)
def test_what_is_kept_of_a_reply(reply, finish, reason):
    problem = "Anna has 70 coins and spends 30 % of them. How many are left?"
    found = self_written.read(reply, finish, problem, "49", SOLUTION)
    assert found.reason == reason and (found.strategy is None) == bool(reason)


def test_a_strategy_keeps_to_one_line_if_the_student_does():
    question = "p", "5", "\\boxed{5}"
    assert self_written.read(f" {STRATEGY}\n", "stop", *question).strategy == STRATEGY
    lines = STRATEGY.replace(" Strategy:", "\nStrategy:").replace(" Steps:", "\nSteps:")
    assert self_written.read(f"Here it is.\n\n{lines}", "stop", *question).strategy == lines


@pytest.fixture(scope="module")
def student():
    """Returns (policy, params, rows, mesh) of an untrained student in the embedded world."""
    config = load(ROOT / "configs" / "quickstart.py")
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    policy, initial = stage.load_policy(config)
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
    with jax.set_mesh(mesh):
        params = sharding.place(initial(jax.random.key(0)), sharding.tree_shardings(initial(jax.random.key(0)), mesh))
    return policy, params, data.load("arithmetic:train,count=20"), mesh


class Killed(BaseException):
    pass


@pytest.fixture
def replies(student, monkeypatch):
    """Makes replies with an even first token strategies, and about every third response correct.

    Both depend only on the sampled tokens. After `replies.left` calls of the engine, the next one raises `Killed`.
    """
    policy, _, rows, _ = student
    written = tokenizer.encode_response(policy.tokenizer, rows[0]["strategy"], policy.stop_ids[0])

    def sampled(*arguments):
        found.calls += 1
        found.asked.append(tokenizer.decode(policy.tokenizer, arguments[2].tokens[0], arguments[2].tokens.shape[1]))
        if found.left == 0:
            raise Killed
        found.left -= 1
        rollout, steps = generation.respond(*arguments)
        group = arguments[-1]
        tokens, lengths, finish = (np.array(x) for x in (rollout.tokens, rollout.lengths, rollout.finish))
        if group == 1:
            wrote = tokens[:, :, 0] % 2 == 0
            tokens[wrote, : len(written)] = written
            lengths[wrote], finish[wrote] = len(written), STOP
        return rollout._replace(tokens=tokens, lengths=lengths, finish=finish), steps

    def judged(policy, rollout, some, reward):
        values = (rollout.tokens[:, :, 0] % 3 == 0).astype(np.float32)
        texts = [[tokenizer.decode(policy.tokenizer, t, 3) or "nothing" for t in group] for group in rollout.tokens]
        return Graded(rollout, texts, [], values)

    class Found:
        calls, left = 0, -1
        asked: list[str] = []  # of the first problem of each batch

    found = Found()
    monkeypatch.setattr(self_written, "respond", sampled)
    monkeypatch.setattr(self_written, "grade", judged)
    return found


def write(student, path, step=0, seed=3, max_prompt_tokens=64):
    policy, params, rows, mesh = student
    config = load(ROOT / "configs" / "quickstart.py")
    config.rl.update({"self_tries": 3, "batch": 8, "max_new_tokens": 24})
    config.seed, config.data.max_prompt_tokens = seed, max_prompt_tokens
    path.parent.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        return self_written.write(Run(config, path.parents[1], policy, mesh), params, rows, step)


def test_every_problem_gets_a_strategy_or_a_reason(student, replies, tmp_path, capsys):
    _, _, rows, _ = student
    found = write(student, tmp_path / "run/rl/strategies.jsonl")
    settings, *verdicts = read_jsonl(tmp_path / "run/rl/strategies.jsonl")
    assert settings["seed"] == 3 and [v["id"] for v in verdicts] == [row["id"] for row in rows]
    assert {v["reason"] for v in verdicts} >= {"kept", "no_correct"} and len({v["reason"] for v in verdicts}) > 2
    for row, ours, verdict in zip(rows, found, verdicts, strict=True):
        assert ours == row | {"strategy": verdict["strategy"]}
        assert (verdict["strategy"] is not None) == (verdict["reason"] == "kept")
        assert (verdict["response"] is None) == (verdict["correct"] == 0) == (verdict["reason"] == "no_correct")
        assert ours["strategy"] in (None, rows[0]["strategy"])
    for plain, asked, row, verdict in zip(*[iter(replies.asked)] * 2, rows[::8], verdicts[::8], strict=True):
        assert plain == f"Problem:\n{row['problem']}"
        request = prompts.own_strategy(row["problem"], verdict["response"] or "", bare=True)
        tokens = tokenizer.encode_turn(student[0].tokenizer, request)
        assert asked == (tokenizer.decode(student[0].tokenizer, tokens, 99) if verdict["correct"] else plain)
    kept = sum(v["reason"] == "kept" for v in verdicts)
    assert "own strategies of 20 problems: " in capsys.readouterr().out and 0 < kept < 20
    # Read back, whatever the engine would say.
    before, replies.left = (tmp_path / "run/rl/strategies.jsonl").read_bytes(), 0
    assert write(student, tmp_path / "run/rl/strategies.jsonl", step=5) == found
    assert (tmp_path / "run/rl/strategies.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="seed=4: .*strategies.jsonl was made with 3"):
        write(student, tmp_path / "run/rl/strategies.jsonl", seed=4)


@pytest.mark.parametrize("calls", range(6))  # three batches, of which each samples twice
def test_a_kill_changes_nothing(student, replies, tmp_path, calls):
    whole = write(student, tmp_path / "whole/rl/strategies.jsonl")
    replies.left = calls
    with pytest.raises(Killed):
        write(student, tmp_path / "run/rl/strategies.jsonl")
    with (tmp_path / "run/rl/strategies.jsonl").open("a") as file:
        file.write('{"kind": "verdict", "id": "copp')
    replies.calls, replies.left = 0, -1
    assert write(student, tmp_path / "run/rl/strategies.jsonl") == whole
    assert replies.calls == 6 - calls // 2 * 2, "what is there is not sampled again"
    assert (tmp_path / "run/rl/strategies.jsonl").read_bytes() == (tmp_path / "whole/rl/strategies.jsonl").read_bytes()


def test_a_kill_between_two_verdicts_of_a_batch_changes_nothing(student, replies, tmp_path):
    whole = write(student, tmp_path / "run/rl/strategies.jsonl")
    content = (tmp_path / "run/rl/strategies.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    (tmp_path / "run/rl/strategies.jsonl").write_bytes(b"".join(lines[:12]) + lines[12][:30])
    assert write(student, tmp_path / "run/rl/strategies.jsonl") == whole
    assert (tmp_path / "run/rl/strategies.jsonl").read_bytes() == content


def test_noise_follows_the_problem_not_its_place(student, replies, tmp_path):
    policy, params, rows, mesh = student
    whole = write(student, tmp_path / "run/rl/strategies.jsonl")
    again = write((policy, params, rows[::-1][:8], mesh), tmp_path / "reversed/rl/strategies.jsonl")
    assert again == whole[::-1][:8]
    other = write(student, tmp_path / "other/rl/strategies.jsonl", seed=5)
    assert other != whole


@pytest.mark.parametrize("room", [0, 12])
def test_prompts_that_are_too_long_are_not_shown(student, replies, tmp_path, room):
    """Without room for a response the student is not asked; with a little, its strategy does not fit."""
    policy, _, rows, _ = student
    longest = max(len(tokens) for tokens in generation.encode_prompts(policy, rows, guided=False))
    found = write(student, tmp_path / "run/rl/strategies.jsonl", max_prompt_tokens=longest + room)
    assert {row["strategy"] for row in found} == {None}
    reasons = {verdict["reason"] for verdict in read_jsonl(tmp_path / "run/rl/strategies.jsonl")[1:]}
    assert {"no_correct", "prompt_too_long"} <= reasons and ("truncated" in reasons) == bool(room)


def test_nothing_is_written_after_the_first_step(student, replies, tmp_path):
    with pytest.raises(ValueError, match="has no verdict on 20 of 20 problems, but RL is at step 2"):
        write(student, tmp_path / "run/rl/strategies.jsonl", step=2)
    assert replies.calls == 0


@pytest.mark.slow
def test_a_run_trains_with_what_its_student_wrote(tmp_path, monkeypatch):
    """The whole path: half of the problems have a strategy; the other half are shown as they are."""
    config = methods.select(load(ROOT / "configs" / "quickstart.py"), "self_strategies")
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train = "arithmetic:train,count=16"
    config.stages = ("rl",)
    config.rl.update({"batch": 8, "micro_batch": 8, "steps": 2, "autonomous": 3, "guided": 2, "max_new_tokens": 24})
    config.rl.update({"self_tries": 6, "reward": "helpers.reward_functions:even"})
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    rows = data.load(config.data.train)
    answered = iter(range(1000))

    def read(reply, finish, problem, answer, solution):
        kept = next(answered) % 2 == 0
        return parsing.Parsed(rows[0]["strategy"] if kept else None, "" if kept else "structure")

    monkeypatch.setattr(self_written, "read", read)
    prompts = []

    def encode(policy, rows, guided, hint="strategy"):
        found = generation.encode_prompts(policy, rows, guided, hint)
        prompts.append(found)
        return found

    monkeypatch.setattr("sgpo_jax.training.inputs.encode_prompts", encode)
    train.run(config, tmp_path)
    verdicts = read_jsonl(tmp_path / "rl" / "strategies.jsonl")[1:]
    kept = [verdict["strategy"] is not None for verdict in verdicts]
    assert len(kept) == 16 and 2 <= sum(kept) <= 8
    plain, guided = prompts
    assert [ours != theirs for ours, theirs in zip(plain, guided, strict=True)] == kept
    steps = read_jsonl(tmp_path / "rl.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 and "reward_guided" in row for row in steps)
    # One more step resumes from the checkpoint with the same strategies.
    config.rl.steps = 3
    train.run(config, tmp_path)
    assert prompts[2:] == prompts[:2] and len(read_jsonl(tmp_path / "rl.jsonl")) == 3


def test_prompts_leave_room_for_a_response_in_the_models_positions(student, replies, tmp_path):
    policy, params, rows, mesh = student
    path = tmp_path / "run/rl/strategies.jsonl"
    write(student, path)
    kept = [verdict["id"] for verdict in read_jsonl(path)[1:] if verdict["reason"] == "kept"]
    longest = max(len(generation.encode_prompts(policy, [row], guided=False)[0]) for row in rows)
    small = policy._replace(config=replace(policy.config, max_positions=longest + 24))
    found = write((small, params, rows, mesh), tmp_path / "small/rl/strategies.jsonl")
    verdicts = read_jsonl(tmp_path / "small/rl/strategies.jsonl")[1:]
    long = [verdict for verdict in verdicts if verdict["reason"] == "prompt_too_long"]
    assert kept and {verdict["id"] for verdict in long} >= set(kept), "their guided prompts are longer than the problem"
    assert all(verdict["detail"].endswith(f" tokens; at most {longest} fit") for verdict in long)
    assert not any(row["strategy"] for row in found)
