"""Grading workers that are killed, hang, grow, or say anything: one item is lost, it is counted, and no other moves."""

import json
import os
import random
import signal
import threading
import time
from contextlib import closing

import pytest

from sgpo_jax import rewards
from sgpo_jax.rewards.pool import _checked

ROW = {"id": "p1", "problem": "1+1?", "answer": "2"}
FUNCTION = "helpers.reward_functions:by_row"
GARBAGE = [
    "",
    "garbage",
    "[]",
    "null",
    "{}",
    '{"outcome": "correct"}',
    '{"retire": false}',
    '{"outcome": "excellent", "retire": false}',
    '{"outcome": ["correct"], "retire": false}',
    '{"outcome": "correct", "retire": 0}',
    '{"outcome": "correct", "retire": false, "reward": 2.0}',
    '{"outcome": "correct", "retire": false, "reward": NaN}',
    '{"outcome": "correct", "retire": false, "reward": "1"}',
    '{"outcome": "correct", "retire": false, "reward": true}',
    '{"outcome": "correct", "retire": false, "note": 5}',
    "[" * 3000,
    "x" * 20_000,
    "\x00\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
]


@pytest.fixture(scope="module")
def pool():
    with closing(rewards.Pool(workers=1, seconds=3.0, reward=FUNCTION)) as pool:
        yield pool


def ask(pool, *responses):
    return pool.ask([{"problem": ROW, "response": response} for response in responses])


def test_a_worker_that_says_anything_costs_its_item_and_no_other(pool):
    """A wrong reply may come before the right one; the right one is never taken for the next item's."""
    asked, wanted = [], []
    for garbage in GARBAGE:
        asked += [f"reply:{garbage}", "answer:2", "answer:3"]
        wanted += ["crash", "correct", "wrong"]
    assert [reply["outcome"] for reply in ask(pool, *asked)] == wanted


def test_a_reply_of_the_right_form_is_one():
    for reply in ({"outcome": "wrong", "retire": True}, {"outcome": "invalid", "retire": False, "note": "n"},
                  {"outcome": "correct", "retire": False, "reward": 1}):  # fmt: skip
        assert _checked(json.loads(json.dumps(reply))) == reply


def test_workers_that_are_killed_all_the_time_lose_what_they_had_and_nothing_else():
    stop, kills = threading.Event(), []
    chosen = random.Random(0)
    with closing(rewards.Pool(workers=2, seconds=20.0, reward=FUNCTION)) as pool:
        ask(pool, "answer:2", "answer:3")

        def kill():
            while not stop.wait(0.25):
                pids = [worker.process.pid for worker in list(pool._workers.values()) if worker.process.poll() is None]
                if pids:
                    kills.append(chosen.choice(pids))
                    os.kill(kills[-1], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            numbers = [2 + i % 3 for i in range(3000)]
            while not kills:
                time.sleep(0.01)
            replies = ask(pool, *(f"answer:{number}" for number in numbers))
        finally:
            stop.set()
            thread.join()
    lost = sum(reply["outcome"] == "crash" for reply in replies)
    assert lost <= len(kills)
    for number, reply in zip(numbers, replies, strict=True):
        if reply["outcome"] != "crash":
            assert reply["outcome"] == ("correct" if number == 2 else "wrong")
            assert reply["reward"] == float(number == 2)


def test_a_worker_that_starts_with_garbage_is_an_error_that_names_it(tmp_path, monkeypatch):
    noise = "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'[]' + b'\\n')\n    except OSError: pass\n"
    (tmp_path / "noisy_reward.py").write_text(f"{noise}def f(row, response): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"rl\.reward='noisy_reward:f': a grading worker did not start: \w*Error"):
        rewards.check("noisy_reward:f")
