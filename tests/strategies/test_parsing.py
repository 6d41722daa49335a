"""Reading strategies and scores out of replies that may be anything."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_jax.strategies import parsing, prompts
from sgpo_jax.strategies.parsing import parse, scores

GOOD = "Problem type: linear equation\nStrategy: isolate the unknown\nSteps: (a) move the constants (b) divide"


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        "Problem type: linear equation. Strategy: isolate the unknown. Steps: (a) move the constants (b) divide",
        "**Problem Type:** linear equation\n\n**Strategy:** isolate the unknown\n\n"
        "**Steps:**\n(a) move the constants\n(b) divide",
        "### Problem type: linear equation\n### Strategy: isolate the unknown\n### Steps:\n1. move the constants\n"
        "2. divide",
        "1. Problem type: linear equation\n2. Strategy: isolate the unknown\n3. Steps:\n- move the constants\n- divide",
        "PROBLEM TYPE： linear equation\nSTRATEGY： isolate the unknown\nSTEPS： Step 1: move the constants\n"
        "Step 2: divide",
        f"Sure! Here is what you asked for:\n\n{GOOD}\n\nI hope this helps. Let me know!",
        f"<think>\nProblem type: wrong. Steps: (a) one\n</think>\n\n{GOOD}",
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("linear", "lin\u200bear\x00"),
        GOOD.replace("(a) move the constants (b)", "\n\n(a) move\n   the constants\n\n(b)"),
        "Problem type: linear equation\nStrategy: isolate the unknown\nSteps: **a)** move the constants\n**b)** divide",
    ],
)  # fmt: skip
def test_many_ways_to_write_the_three_parts(reply):
    found = parse(reply)
    assert found.reason == "" and found.strategy.replace(". ", " ").replace(".\n", "\n") == GOOD


def test_the_one_form_is_read_as_itself():
    assert parse(GOOD) == (GOOD, "", "")
    many = GOOD.replace("(b) divide", " ".join(f"({c}) divide by {c}, then (a) again" for c in "bcdefghijkl"))
    assert parse(many).strategy == many, "a letter out of turn opens no step"


@pytest.mark.parametrize(
    ("reply", "finish", "reason"),
    [
        ("", "stop", "empty"),
        (" \n\t", "stop", "empty"),
        ("<think> so", "stop", "truncated"),
        (GOOD, "length", "truncated"),
        (GOOD, "refused", "refusal"),
        ("I'm sorry, but I can't help with that.", "stop", "refusal"),
        ("As an AI, I must decline.", "stop", "refusal"),
        ("The answer is 5.", "stop", "structure"),
        ("nan", "stop", "structure"),
        (GOOD.replace("Strategy:", "Approach:"), "stop", "structure"),
        (GOOD.partition("\nSteps")[0], "stop", "structure"),
        (f"{GOOD}\n\n{GOOD}", "stop", "structure"),
        ("Steps: (a) move (b) divide\nProblem type: linear\nStrategy: isolate", "stop", "structure"),
        (GOOD.replace("linear equation", "NaN").replace("NaN", "1"), "stop", "structure"),
        (GOOD.replace("isolate the unknown", ""), "stop", "structure"),
        (GOOD.replace(" (b) divide", ""), "stop", "structure"),
        (GOOD.replace("(a) move the constants (b) divide", "just do it"), "stop", "structure"),
        (GOOD.replace("(b) divide", "(b)"), "stop", "structure"),
        (GOOD.replace("(b) divide", " ".join(f"({c}) divide" for c in "bcdefghijklm")), "stop", "structure"),
        (GOOD.replace("linear", "linear " * 200), "stop", "too_long"),
        (GOOD.replace("divide", "divide (c) " + "and more " * 110 + "(d) " + "and more " * 110), "stop", "too_long"),
        (GOOD + " x" * 20_000, "stop", "too_long"),
        (GOOD.replace("isolate the unknown", "移項並合併同類項求出未知數的值再代回原方程式檢驗"), "stop", "language"),
        (GOOD.replace("isolate the unknown", "перенести известные величины в правую часть"), "stop", "language"),
    ],
)  # fmt: skip
def test_what_is_no_strategy_is_named(reply, finish, reason):
    found = parse(reply, finish)
    assert (found.strategy, found.reason) == (None, reason)


def test_limits_hold_exactly():
    fits = GOOD.replace("divide", "d" * (parsing.MAX_STRATEGY - len(GOOD) + 6))
    assert len(fits) == parsing.MAX_STRATEGY
    assert parse(fits).reason == "too_long", "one part is too long already"
    part = "d" * parsing.MAX_PART
    assert parse(GOOD.replace("divide", part)).reason == ""
    assert parse(GOOD.replace("divide", part + "d")).reason == "too_long"
    rest = "e" * (parsing.MAX_STRATEGY - len(GOOD.replace("divide", part + " (c) ")))
    assert parse(GOOD.replace("divide", f"{part} (c) {rest}")).reason == ""
    assert parse(GOOD.replace("divide", f"{part} (c) {rest}e")).reason == "too_long"


def test_mathematical_letters_are_no_foreign_language():
    assert parsing.foreign_share("α β ℝ ∑ 𝑥 é ü ı") == 0
    assert parsing.foreign_share("ab 數學") == 0.5
    assert parsing.foreign_share("12 + 3") == 0


# ---- scores


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Score: [0.8, 1, 0]", [0.8, 1.0, 0.0]),
        ("**Score:** [ 0.80 , 1.0, .5 ]", [0.8, 1.0, 0.5]),
        ("First I thought [0.1, 0.1, 0.1]. No.\nScore: [0.2, 0.3, 0.4]\nDone.", [0.2, 0.3, 0.4]),
        ("<think>Score: [1, 1, 1]</think>Score:\n[0.2,\n0.3,\n0.4]", [0.2, 0.3, 0.4]),
        ("Score: [`0.2`, *0.3*, 0.4]", [0.2, 0.3, 0.4]),
    ],
)
def test_scores_are_the_last_list(reply, expected):
    assert scores(reply, 3) == (expected, "")


@pytest.mark.parametrize(
    ("reply", "finish", "reason"),
    [
        ("Score: [0.8, 1]", "stop", "2 scores for 3"),
        ("Score: [0.8, 1, 0, 0]", "stop", "4 scores for 3"),
        ("Score: []", "stop", "1 scores for 3"),
        ("Score: [0.8, 1.1, 0]", "stop", "score '1.1' is no number"),
        ("Score: [0.8, -0.1, 0]", "stop", "score '-0.1' is no number"),
        ("Score: [0.8, NaN, 0]", "stop", "score 'NaN' is no number"),
        ("Score: [0.8, inf, 0]", "stop", "score 'inf' is no number"),
        ("Score: [0.8, 1e-1, 0]", "stop", "score '1e-1' is no number"),
        ("Score: [8/10, 1, 0]", "stop", "score '8/10' is no number"),
        ("Score: [80%, 1, 0]", "stop", "score '80%' is no number"),
        ("Score: [0.8, ٠.٥, 0]", "stop", "score '٠.٥' is no number"),
        ("Score: 0.8, 1, 0", "stop", "no list of scores"),
        ("I cannot judge these.", "stop", "refusal"),
        ("Score: [0.8, 1, 0]", "length", "truncated"),
        ("Score: [0.8, 1, 0", "stop", "no list of scores"),
        ("", "stop", "empty"),
        ("Score: [0.8, 1, 0]" + " " * 3 + "x" * 30_000, "stop", "too_long"),
    ],
)
def test_scores_that_cannot_be_used_are_named(reply, finish, reason):
    values, why = scores(reply, 3, finish)
    assert values is None and why.startswith(reason)


def test_the_best_is_the_first_of_the_highest():
    assert parsing.best([0.1, None, 0.7, 0.7]) == 2
    assert parsing.best([0.0, None]) == 0
    assert parsing.best([None, None]) is None


@pytest.mark.parametrize(
    ("rating", "band"), [(1, "high"), (0.8, "high"), (0.79, "medium"), (0.5, "medium"), (0.49, "low")]
)
def test_bands(rating, band):
    assert parsing.band(rating) == band
    assert parsing.band(sum([0.1, 0.7, 0.9, 0.3]) / 4) == "medium", "0.5 but for rounding"


# ---- anything at all

PIECES = st.sampled_from(
    ["Problem type:", "Strategy:", "Steps:", "(a) ", "(b) ", "\n", "\n\n", "1. ", "**", "[0.5", ", ", "]", "<think>",
     "</think>", "sorry", " ", "\ud800", "題", "\\boxed{", "0.5", "word "]
)  # fmt: skip
HOSTILE = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join))


@settings(max_examples=300)
@given(HOSTILE, st.sampled_from(["stop", "length", "refused", "?"]))
def test_no_text_breaks_the_readers(text, finish):
    found = parse(text, finish)
    assert (found.strategy is None) == bool(found.reason)
    if found.strategy is not None:
        assert parse(found.strategy) == found, "what is kept is in the one form"
        assert len(found.strategy) <= parsing.MAX_STRATEGY
    values, why = scores(text, 2, finish)
    assert (values is None) == bool(why)
    assert values is None or all(0 <= value <= 1 for value in values)


words = st.lists(st.sampled_from(["align", "the", "numbers", "x^2", "carry", "and", "α"]), min_size=1, max_size=6)


@given(words, words, st.lists(words, min_size=2, max_size=12))
def test_every_well_formed_strategy_is_read_back(kind, principle, steps):
    listed = " ".join(f"({chr(97 + i)}) do {' '.join(step)}" for i, step in enumerate(steps))
    text = f"Problem type: for {' '.join(kind)}\nStrategy: by {' '.join(principle)}\nSteps: {listed}"
    assert parse(text).strategy == text
    assert parse(f"Here you are.\n\n{text}\n\nThat is all.").strategy == text


@pytest.mark.parametrize(
    "piece",
    ["a", " ", "\n", "[", "]", "[[", "<think>", "</think>", "Steps:", "steps ", "(a)", "\n- ", "**", "1.", "[0.1,",
     "\n \n", "題", ". "],
)  # fmt: skip
def test_a_megabyte_of_anything_takes_no_time(at_most, piece):
    text = piece * (1_000_000 // len(piece))
    with at_most(2.0):
        for reply in (text, "Problem type: x\nStrategy: y\nSteps: " + text, text[:19_000], GOOD + text[:19_000]):
            parse(reply)
            scores(reply, 5)


# ---- the prompts


def test_prompts_ask_for_what_the_readers_read():
    text = prompts.extraction("{p}", "{s}")
    assert "{p}" in text and "{s}" in text
    assert text.endswith("Problem type: ...\nStrategy: ...\nSteps: (a) ... (b) ... (c) ...")
    text = prompts.scoring("{p}", "{s}", ["one", "two", "three"])
    assert "Candidate 1:\none\n\nCandidate 2:\ntwo\n\nCandidate 3:\nthree\n\n" in text
    assert text.endswith("Score: [s1, s2, s3]") and "candidates (3)" in text
    text = prompts.audit("{p}", "{s}", "{t}")
    assert all(part in text for part in ("{p}", "{s}", "{t}", "Ratings: [r1, r2, r3, r4]"))
    assert len(prompts.CRITERIA) == 4
    assert prompts.expert("{p}").startswith("Problem:\n{p}\n\n") and "\\boxed{}" in prompts.expert("")


def test_another_wording_needs_another_version():
    """An extraction resumes only with the prompts it was started with; the version stands for their text."""
    texts = [prompts.expert("p"), prompts.extraction("p", "s"), prompts.scoring("p", "s", ["c", "d"])]
    texts.append(prompts.audit("p", "s", "t"))
    pinned = {"1": "b12e77ab184c4b11"}
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == pinned[prompts.PROMPT_VERSION]
