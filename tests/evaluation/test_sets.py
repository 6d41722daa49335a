"""Grading of rollouts, intervals, and the evaluation of a set."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpo_jax import data, models, policy, rollout, sharding
from sgpo_jax.evaluation import majority, sets
from sgpo_jax.policy import generation, tokenizer
from sgpo_jax.policy.policy import huggingface
from sgpo_jax.rollout import LENGTH, STOP, Rollout
from sgpo_jax.runtime.files import read_jsonl


@pytest.fixture(scope="module")
def small():
    """(policy, params) of a random decoder for the embedded world."""
    small, initial = policy.load(
        "scratch", "arithmetic", layers=1, hidden=16, heads=2, mlp=16, dtype=jnp.float32, instruction=""
    )
    return small, initial(jax.random.key(0), sharding.make_mesh(devices=jax.devices()[:1]))


def rollout_of(small, texts, finish):
    """A rollout `[1,G]` that says `texts`."""
    tokens = [tokenizer.encode_response(small.tokenizer, text, small.stop_ids[0]) for text in texts]
    padded, lengths = tokenizer.pad_right(tokens, max(map(len, tokens)), small.pad_id)
    return Rollout(padded[None], np.zeros((1, *padded.shape), np.float32), lengths[None], np.array([finish]))


def test_a_response_cut_at_the_limit_scores_0_even_when_right(small):
    texts = ["(a) sum 1 2 = 3. \\boxed{352}", " \\boxed{352}", " \\boxed{351}", " sum 3 4"]
    graded = generation.grade(small[0], rollout_of(small[0], texts, [STOP, LENGTH, STOP, STOP]), [{"answer": "352"}])
    assert graded.texts == [texts]
    assert graded.rewards.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert [v.outcome for v in graded.verdicts[0]] == ["correct", "correct", "wrong", "no_box"]


def test_answers_belong_to_their_problems(small):
    parts = [rollout_of(small[0], [f" \\boxed{{{answer}}}"] * 2, [STOP, STOP]) for answer in (352, 417)]
    both = Rollout(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    rows = [{"answer": "352"}, {"answer": "417"}]
    assert generation.grade(small[0], both, rows).rewards.tolist() == [[1, 1], [1, 1]]
    assert generation.grade(small[0], both, rows[::-1]).rewards.tolist() == [[0, 0], [0, 0]]


def test_noise_keys_differ_in_seed_purpose_and_step():
    triples = [(0, "autonomous", 0), (1, "autonomous", 0), (0, "guided", 0), (0, "autonomous", 1)]
    keys = {tuple(jax.random.key_data(generation.noise_key(*triple)).tolist()) for triple in triples}
    assert len(keys) == 4
    assert jnp.all(
        jax.random.key_data(generation.noise_key(*triples[0])) == jax.random.key_data(generation.noise_key(*triples[0]))
    )


def test_evaluate_reports_what_the_generations_say(small, tmp_path):
    rows = data.load("arithmetic:eval,count=5")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def run(batch, step=0, guided=False):
        settings = sets.Settings("set", 0, step, guided, 3, rollout.Sampling(6), batch)
        path = tmp_path / f"{batch}_{step}_{guided}.jsonl"
        return sets.evaluate(*small, [sets.Chosen(rows, settings, path)], mesh)[0]

    result = run(2)
    lines = read_jsonl(tmp_path / "2_0_False.jsonl")
    assert [(line["id"], line["sample"]) for line in lines] == [(row["id"], i) for row in rows for i in range(3)]
    assert result["accuracy"] == pytest.approx(np.mean([line["reward"] for line in lines]))
    assert result["truncated"] == pytest.approx(np.mean([line["truncated"] for line in lines]))
    assert result["length"] == pytest.approx(np.mean([line["tokens"] for line in lines]))
    assert result["no_box"] == pytest.approx(np.mean([line["outcome"] == "no_box" for line in lines]))
    assert len(result["per_problem"]) == 5
    run(4)
    responses = [line["response"] for line in lines]
    in_other_batches = [line["response"] for line in read_jsonl(tmp_path / "4_0_False.jsonl")]
    assert in_other_batches == responses
    run(2, step=1)
    run(2, guided=True)
    for name in ("2_1_False", "2_0_True"):
        assert [line["response"] for line in read_jsonl(tmp_path / f"{name}.jsonl")] != responses
    assert not list(tmp_path.glob("*.partial"))


SETTINGS = sets.Settings("set", seed=0, step=3, guided=False, samples=3, sampling=rollout.Sampling(6), batch=2)


def evaluate_five(small, path, rows=None, restart=False, **changed):
    rows = rows or data.load("arithmetic:eval,count=5")
    sampling = {name: changed.pop(name) for name in ("temperature", "top_p", "slots") if name in changed}
    changed["sampling"] = dataclasses.replace(SETTINGS.sampling, **sampling)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    chosen = sets.Chosen(rows, dataclasses.replace(SETTINGS, **changed), path)
    return sets.evaluate(*small, [chosen], mesh, restart)[0]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.45, 0.7, 0.9, 1.0])
def test_an_evaluation_cut_anywhere_goes_on_to_the_same_bytes(small, tmp_path, monkeypatch, share):
    path = tmp_path / "set.jsonl"
    # Texts of several bytes a character, so that a cut may fall inside one.
    monkeypatch.setattr(generation.tokenizers, "decode", lambda tok, tokens, length: "\u20ac" * int(length))
    whole = evaluate_five(small, path)
    content = path.read_bytes()
    cut = (
        content.index("\u20ac".encode(), round(share * len(content))) + 1
        if 0 < share < 1
        else round(share * len(content))
    )
    path.write_bytes(content[:cut])
    sampled = []
    original = sets.respond
    monkeypatch.setattr(sets, "respond", lambda *a, **k: sampled.append(a[3].tolist()) or original(*a, **k))
    assert evaluate_five(small, path) == whole
    assert path.read_bytes() == content
    lines = [n for n in range(0, 6, 2) if content[:cut].count(b"\n") < 3 * min(n + 2, 5)]
    assert [ids[0] for ids in sampled] == lines, "whole problems are not sampled again"


def test_what_the_file_says_of_a_whole_problem_stays(small, tmp_path):
    path = tmp_path / "set.jsonl"
    evaluate_five(small, path)
    lines = path.read_text().splitlines()
    graded_by_hand = lines[6].replace('"reward": 0.0', '"reward": 1.0')
    assert graded_by_hand != lines[6]
    path.write_text("\n".join([*lines[:6], graded_by_hand, *lines[7:10]]) + "\n")  # problem 3 is torn, 4 is not there
    assert evaluate_five(small, path)["per_problem"][2] == pytest.approx(1 / 3)
    assert path.read_text().splitlines() == [*lines[:6], graded_by_hand, *lines[7:]]


def test_a_file_made_with_other_settings_is_refused_or_made_anew(small, tmp_path):
    path = tmp_path / "set.jsonl"
    first = evaluate_five(small, path)
    content = path.read_bytes()
    other_rows = data.load("arithmetic:eval,count=4")
    changes = [{"seed": 1}, {"step": 4}, {"samples": 2}, {"temperature": 0.5}, {"model": "other"}, {"rows": other_rows}]
    for changed in changes:
        name = "problems" if "rows" in changed else next(iter(changed))
        with pytest.raises(ValueError, match=rf"set.jsonl was made with {name} .*choose another --out"):
            evaluate_five(small, path, **changed)
        assert path.read_bytes() == content
    assert evaluate_five(small, path, batch=5) == first, "how many at once makes no difference"
    evaluate_five(small, path, seed=1, restart=True)
    assert path.read_bytes() != content
    assert evaluate_five(small, path, restart=True) == first
    assert path.read_bytes() == content


def test_sets_of_as_many_samples_are_sampled_together(small, tmp_path, monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    sizes = {"first": (3, 3, 3), "other": (5, 2, 3), "second": (4, 3, 3), "later": (1, 3, 4)}  # problems, samples, step
    chosen = [
        sets.Chosen(data.load(f"arithmetic:eval,count={count},seed={i}"),
                    dataclasses.replace(SETTINGS, name=name, samples=samples, step=step), tmp_path / f"{name}.jsonl")
        for i, (name, (count, samples, step)) in enumerate(sizes.items())
    ]  # fmt: skip
    calls = []
    original = sets.respond
    monkeypatch.setattr(sets, "respond", lambda *a, **k: calls.append((a[3].tolist(), a[7])) or original(*a, **k))
    results = sets.evaluate(*small, chosen, mesh)
    # Batches of 2: the third problem of the first set and the first one of the second share one.
    of_three, of_two = [[0, 1], [2, 0], [1, 2], [3, 3]], [[0, 1], [2, 3], [4, 4]]
    assert calls == [*((ids, 3) for ids in of_three), *((ids, 2) for ids in of_two), ([0, 0], 3)]
    together = [each.path.read_bytes() for each in chosen]
    for each, result, content in zip(chosen, results, together, strict=True):
        alone = each._replace(path=tmp_path / "alone.jsonl")
        assert sets.evaluate(*small, [alone], mesh, restart=True) == [result]
        assert alone.path.read_bytes() == content
    # A batch of two sets, of which one problem is there already, leaves this one as it is.
    lines = together[2].splitlines(keepends=True)
    chosen[2].path.write_bytes(b"".join(lines[3:]))
    calls.clear()
    sets.evaluate(*small, chosen, mesh)
    assert calls == [([2, 0], 3)]
    assert chosen[2].path.read_bytes() == b"".join(lines[3:] + lines[:3])
    assert chosen[0].path.read_bytes() == together[0]


def test_what_is_unsolvable_as_stated_is_counted_both_ways(small, tmp_path, monkeypatch):
    rows = data.load("arithmetic:eval,count=5")
    monkeypatch.setattr(sets.unsolvable, "reason", lambda problem: problem == rows[1]["problem"] or None)
    monkeypatch.setattr(generation.rewards, "judge", lambda texts, rows, reward: [VERDICTS[row["id"]] for row in rows])
    monkeypatch.setattr(generation, "STOP", generation.STOP | 1)  # a response cut at the limit counts as well
    VERDICTS = {row["id"]: generation.rewards.Verdict(float(i != 1), "correct", "1") for i, row in enumerate(rows)}
    result = evaluate_five(small, tmp_path / "set.jsonl")
    kept = [value for i, value in enumerate(result["per_problem"]) if i != 1]
    assert (result["problems"], result["solvable"]["problems"]) == (5, 4)
    assert result["solvable"]["per_problem"] == kept
    assert result["accuracy"] == pytest.approx(np.mean(result["per_problem"]))
    assert result["solvable"]["accuracy"] == pytest.approx(np.mean(kept))


def graded(*answers, outcomes, finish=None):
    """One problem whose responses gave these answers."""
    verdicts = [
        generation.rewards.Verdict(float(outcome == "correct"), outcome, answer)
        for answer, outcome in zip(answers, outcomes, strict=True)
    ]
    shape = (1, len(answers))
    ends = np.array([finish or [STOP] * len(answers)])
    empty = Rollout(np.zeros((*shape, 1), int), np.zeros((*shape, 1)), np.ones(shape, int), ends)
    return generation.Graded(empty, [[""] * len(answers)], [verdicts], np.array([[v.reward for v in verdicts]]))


def test_equal_answers_share_a_vote():
    wrong = ["wrong"] * 7
    votes = majority.votes(graded(r"\frac12", "0.5", "x+1", "1+x", "7", r"\frac{2}{4}", "7.0", outcomes=wrong))
    assert votes == [[0, 0, 1, 1, 2, 0, 2]]
    mixed = ["wrong", "correct", "correct", "no_box", "wrong", "timeout", "timeout"]
    votes = majority.votes(graded("8", "3", "9/3", None, "08", "9^{9^9}", "9^{9^9}", outcomes=mixed))
    assert votes == [[0, 1, 1, -1, 0, 2, 2]]
    votes = majority.votes(graded("136", "330", "136", "330", "7", "136", outcomes=wrong[:6]))
    assert votes == [[0, 1, 0, 1, 2, 0]], "an answer given again after another"
    votes = majority.votes(graded("8", "8", outcomes=wrong[:2], finish=[LENGTH, STOP]))
    assert votes == [[-1, 0]]


def test_grades_and_votes_are_the_same_when_processes_share_them(small, monkeypatch):
    texts = [rf" \boxed{{{answer}}}" for answer in (352, 417, 352, 9, 417, 9, 0, 352, 9, 9)]
    parts = [rollout_of(small[0], [text, " sum 3 4", texts[i - 1]], [STOP] * 3) for i, text in enumerate(texts)]
    whole = Rollout(*(np.concatenate([pad_to(field, 12) for field in fields]) for fields in zip(*parts, strict=True)))
    rows = [{"answer": "352"}] * 5 + [{"answer": "9"}] * 5
    alone = generation.grade(small[0], whole, rows)
    votes = majority.votes(alone)
    shares = []

    def split(work, items):
        """As three processes would, what they say travelling as JSON."""
        results = [None] * len(items)
        for process in range(3):
            results[process::3] = json.loads(json.dumps(work(items[process::3])))
            shares.append(len(results[process::3]))
        return results

    monkeypatch.setattr(generation.distributed, "split", split)
    shared = generation.grade(small[0], whole, rows)
    assert shared.texts == alone.texts and shared.verdicts == alone.verdicts
    np.testing.assert_array_equal(shared.rewards, alone.rewards)
    assert 0 < alone.rewards.mean() < 1 and len({str(vote) for vote in votes}) > 1
    assert majority.votes(shared) == votes
    assert shares == [4, 3, 3] * 2


def pad_to(field, length):
    """A field of a rollout, its last axis made longer if it is one of tokens."""
    return np.pad(field, ((0, 0), (0, 0), (0, length - field.shape[2]))) if field.ndim == 3 else field


def test_policy_from_a_hugging_face_folder(small, tmp_path):
    """What policy.load reads from an exported folder is what was exported."""
    folder = tmp_path / "model"
    source, params = small
    models_saved = huggingface.save(
        folder, params, source.config, tokenizer=source.tokenizer, stop_ids=source.stop_ids
    )
    assert models_saved is None
    loaded, initial = policy.load(
        str(folder), "", layers=0, hidden=0, heads=0, mlp=0, dtype=jnp.float32, instruction="x"
    )
    assert loaded.config == source.config and loaded.stop_ids == source.stop_ids and loaded.pad_id == source.pad_id
    jax.tree.map(np.testing.assert_array_equal, initial(jax.random.key(1), sharding.make_mesh()), params)
    prompt = generation.encode_prompts(loaded._replace(instruction=""), data.load("arithmetic:eval,count=1"), False)
    assert prompt == generation.encode_prompts(source, data.load("arithmetic:eval,count=1"), False)
    out, _ = rollout.generate(
        params, loaded.language_model, generation.pad_prompts(loaded, prompt, 20), jax.random.key(0), jnp.arange(1),
        sampling=rollout.Sampling(3), group=2,
    )  # fmt: skip
    assert out.tokens.shape == (1, 2, 3)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(small, tmp_path):
    source, _ = small
    config = models.ModelConfig(**{**source.config.__dict__, "vocab_size": 50})
    params = models.init(jax.random.key(0), config)
    huggingface.save(tmp_path / "model", params, config)
    with pytest.raises(ValueError, match=r"tokenizer has 126 tokens, the model's vocabulary 50"):
        policy.load(
            str(tmp_path / "model"), "arithmetic", layers=0, hidden=0, heads=0, mlp=0, dtype=jnp.float32, instruction=""
        )
