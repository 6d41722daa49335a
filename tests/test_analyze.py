"""The analysis: the KL it computes, what it writes, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.folders import config_of, generations, write_jsonl

from sgpo_jax import data, models, sharding
from sgpo_jax.commands import analyze
from sgpo_jax.policy.generation import encode_prompts
from sgpo_jax.policy.tokenizer import encode_response, pad_left, pad_right
from sgpo_jax.report import figures
from sgpo_jax.rollout import Prompts
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.training import stage, state


@pytest.fixture(scope="module")
def config():
    config = config_of("quickstart.py")
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train = "arithmetic:train,count=16"
    config.eval.sets.heldout.source = "arithmetic:eval,count=6"
    config.rl.max_new_tokens = 12
    return config.lock()


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=1, fsdp=8, tensor=1)


@pytest.fixture(scope="module")
def policy(config):
    return stage.load_policy(config)


def save(config, workdir, policy, mesh, part, step, seed):
    loaded, initial = policy
    tx, _ = stage.optimizer(config, part, 1)
    with stage.checkpoints(config, workdir, part) as saved:
        params = initial(jax.random.key(seed))
        # Far from uniform, so that the two contexts differ.
        params = jax.tree.map(lambda x: x * 4, params)
        saved.save(step, state.init_state(params, tx), 0.5)
    return params


def test_kl_is_that_of_each_context_alone_whatever_the_padding(policy, mesh):
    loaded, initial = policy
    params, rng = initial(jax.random.key(1)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x * 4, params)
    vocabulary = loaded.config.vocab_size

    def draw(count):
        return [int(i) for i in rng.integers(5, vocabulary, count)]

    guided, unguided = ([draw(n) for n in rng.integers(least, least + 4, 16)] for least in (9, 3))
    responses = [draw(n) for n in rng.integers(1, 7, 16)]
    tokens, lengths = pad_right(responses, 6, loaded.pad_id)
    sides = [Prompts(*pad_left(each, max(map(len, each)), loaded.pad_id)) for each in (guided, unguided)]
    with jax.set_mesh(mesh):
        found = analyze.response_kl(loaded, params, *sides, tokens, lengths, mesh)
    assert found.shape == (16, 6)
    split = sharding.make_mesh(data=2, fsdp=2, context=2)
    with jax.set_mesh(split):
        parts = analyze.response_kl(loaded, params, *sides, tokens, lengths, split)
    np.testing.assert_allclose(parts, found, atol=1e-5)

    @jax.jit
    def all_logits(ids):
        hidden, _ = models.apply(params, loaded.config, ids, jnp.arange(ids.shape[1])[None], ids >= 0)
        return hidden[0] @ models.head(params, loaded.config)

    def log_probs(prompt, response):
        logits = np.asarray(all_logits(jnp.array([prompt + response]))[len(prompt) - 1 : -1], np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    for i, response in enumerate(responses):
        p, q = log_probs(guided[i], response), log_probs(unguided[i], response)
        wanted = (np.exp(p) * (p - q)).sum(axis=-1)
        assert wanted.max() > 0.01, "a divergence that is worth the name"
        np.testing.assert_allclose(found[i, : len(response)], wanted, atol=1e-4)
        assert (found[i, len(response) :] == 0).all()


def test_it_writes_every_token_with_its_kl_and_the_steps(config, policy, mesh, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"there is no checkpoint of stage 'rl' or 'sft'"):
        analyze.run(config, tmp_path, 2)
    save(config, tmp_path, policy, mesh, "sft", 3, seed=1)
    lines = analyze.run(config, tmp_path, 8)
    printed = capsys.readouterr().out
    assert read_jsonl(tmp_path / "analysis.jsonl") == json.loads(json.dumps(lines))
    assert (tmp_path / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert [line["set"] for line in lines] == ["heldout"] * 6 + ["training"] * 2
    assert all((line["stage"], line["step"], line["delta"]) == ("sft", 3, 1.0) for line in lines)
    for line in lines:
        assert len(line["tokens"]) == len(line["token_kl"]) <= 12
        assert "".join(line["tokens"]).removesuffix("<|end|>") == line["response"] or not line["truncated"]
        assert [s["start"] for s in line["steps"]][1:] == [s["stop"] for s in line["steps"]][:-1]
        assert line["problem"] in printed and line["strategy"].startswith("Problem type")
    assert max(kl for line in lines for kl in line["token_kl"]) > 0.01

    save(config, tmp_path, policy, mesh, "rl", 2, seed=2)
    (again,) = analyze.run(config, tmp_path, 1)
    assert (again["stage"], again["step"]) == ("rl", 2) and again["token_kl"] != lines[0]["token_kl"]
    assert analyze.run(config, tmp_path, 1) == [again], "the same every time"


def test_the_generations_that_the_page_shows_get_their_kl_too(config, policy, mesh, tmp_path):
    loaded, _ = policy
    params = save(config, tmp_path, policy, mesh, "rl", 2, seed=2)
    rows = data.load(config.eval.sets.heldout.source)
    texts = {"unguided": "(a) sum 3 4 = 7", "guided": " (b) larger 5 2 = 5. \\boxed{75}"}
    for when in ("before", "after"):
        for kind, text in texts.items():
            firsts = generations(("wrong",) * 6, 2)[::2]
            lines = [line | {"id": row["id"], "response": text if i else ""}
                     for i, (row, line) in enumerate(zip(rows, firsts, strict=True))]  # fmt: skip
            write_jsonl(tmp_path / "eval" / when / f"heldout_{kind}_000002.jsonl", lines)
    analyze.run(config, tmp_path, 1)
    lines = read_jsonl(tmp_path / "analysis_generations.jsonl")
    expected = [(f"after, {kind}", row["id"], text) for row in rows[1:] for kind, text in texts.items()]
    assert [(line["column"], line["id"], line["response"]) for line in lines] == expected, "and no empty ones"
    for line in lines[:4]:
        assert "".join(line["tokens"]) == line["response"]
        (row,) = (row for row in rows if row["id"] == line["id"])
        encoded = [encode_prompts(loaded, [row] * 8, guided) for guided in (True, False)]
        sides = [Prompts(*pad_left(prompts, 64, loaded.pad_id)) for prompts in encoded]
        ids = encode_response(loaded.tokenizer, line["response"], 0)[:-1]
        tokens, lengths = pad_right([ids] * 8, len(ids), loaded.pad_id)
        with jax.set_mesh(mesh):
            wanted = analyze.response_kl(loaded, params, *sides, tokens, lengths, mesh)[0]
        np.testing.assert_allclose(line["token_kl"], wanted, atol=1e-5)
    assert max(kl for line in lines for kl in line["token_kl"]) > 0.01


def test_problems_without_strategies_are_refused(config, tmp_path):
    rows = [{"id": "a", "problem": "1 + 1", "answer": "2", "solution": "2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config.copy_and_resolve_references()
    config.data.train = config.eval.sets.heldout.source = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"config.data.train=.*must have problems with strategies"):
        analyze.run(config, tmp_path, 2)


def test_the_terminal_shows_a_token_the_stronger_the_larger_its_kl():
    text = analyze.coloured({"tokens": ["a", "[b]", "c"], "token_kl": [0.0, 0.25, 9.0], "delta": 1.0})
    assert text.plain == "a[b]c", "nothing is markup"
    assert [span.style for span in text.spans] == [
        f"black on rgb({colour})" for colour in ("255,255,255", "234,174,128", "213,94,0")
    ]


def test_the_figure_has_steps_above_their_tokens(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))
    line = {
        "id": "p$1", "outcome": "wrong", "delta": 1.0, "tokens": ["(a)", " $x", ".", " y$"],
        "token_kl": [0.0, 0.5, 0.25, 2.0],
        "steps": [{"start": 0, "stop": 3, "mean_kl": 0.25}, {"start": 3, "stop": 4, "mean_kl": 2.0}],
    }  # fmt: skip
    figures.token_kl([line] * 3, tmp_path / "analysis.png")
    axes = [axes for part in saved[0].subfigs for axes in part.axes]
    assert len(axes) == 6
    means, tokens = axes[:2]
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in means.patches] == [
        (-0.5, 3, 0.25), (2.5, 1, 2.0)
    ]  # fmt: skip
    assert [bar.get_height() for bar in tokens.patches] == line["token_kl"]
    assert [label.get_text() for label in tokens.get_xticklabels()] == ["(a)", "$x", ".", "y$"]
    assert [line.get_ydata()[0] for line in tokens.get_lines() if line.get_label() == "delta"] == [1.0]
    saved[0].draw_without_rendering()  # a dollar sign begins no formula
    figures.token_kl([line | {"delta": None}], tmp_path / "analysis.png")
    assert "delta" not in [line.get_label() for line in saved[1].subfigs[0].axes[1].get_lines()]
