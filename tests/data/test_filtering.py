import json
from collections import Counter

import pytest
from helpers.paths import SHARED
from hypothesis import given
from hypothesis import strategies as st

from sgpo_jax import data
from sgpo_jax.data import filtering, overlap
from sgpo_jax.data.filtering import Sieve

WORDS = "a farmer sells nine brown eggs at the market every single morning except on sundays for cash".split()


def rows(*problems, prefix="r", **fields):
    return [{"id": f"{prefix}{i}", "problem": text, "answer": "1", **fields} for i, text in enumerate(problems)]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


# Duplicates


@pytest.mark.parametrize(
    "one, other",
    [
        ("Find  $x$.", "find x."),
        (r"What is $\dfrac{1}{2}+ x^2$?", r"what is \frac{1}{2} + x^2 ?"),
        (r"\left( 3,\, 4 \right)", "(3,4)"),
        (r"\[a\quad b\]", "$$a~b$$"),
        ("2 x = 4", "2x=4"),
        ("İstanbul\n\tis", "i\u0307stanbul is"),
    ],
)
def test_layout_does_not_change_a_problem(one, other):
    assert overlap.key(one) == overlap.key(other)
    assert filtering.duplicates(rows(one, "else", other)) == {"r2": "r0"}


@pytest.mark.parametrize(
    "one, other",
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("3 4, 5 2", "34, 52"),
        ("x^{12}", "x^{1}2"),
        (r"\leftarrow x", "arrow x"),
        ("1.5", "15"),
        ("a < b", "a > b"),
    ],
)
def test_what_changes_the_problem_is_kept(one, other):
    assert overlap.key(one) != overlap.key(other)
    assert filtering.duplicates(rows(one, other)) == {}


def test_the_first_of_several_is_the_original():
    assert filtering.duplicates(rows("a", "b", "A", "b ", "a")) == {"r2": "r0", "r3": "r1", "r4": "r0"}


# Contamination


def same(training, evaluation):
    return filtering.contaminated(training, {"set": evaluation})["set"].same


@given(st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_thirteen_words_in_a_row_are_contamination_and_twelve_are_not(before, after, thirteen):
    shared = WORDS[: 13 if thirteen else 12]
    evaluation = rows(" ".join(["Once", *shared, "thereafter"]), prefix="e")
    text = "; ".join(["x"] * before + [word.upper() for word in shared] + ["y"] * after)
    assert same(rows("Nothing alike", text), evaluation) == ({"r1": "e0"} if thirteen else {})
    assert same(rows(" ".join(reversed(text.split()))), evaluation) == {}


def test_a_short_problem_must_be_there_as_a_whole():
    evaluation = rows("What is 3 + 4?", " ".join(WORDS[:12]), "Find x.", prefix="e")
    training = rows(
        "what is $3+4$?",
        "What is 3 + 5?",
        "What is 3 + 4.5?",
        "What is 3 + 4 * 2?",
        "And what is 3 + 4?",
        " ".join(WORDS[:13]),
        " ".join(WORDS[:12]),
        "Let x = 3. Find x.",
    )
    assert same(training, evaluation) == {"r0": "e0", "r6": "e1"}


@pytest.mark.parametrize(
    "problem",
    [
        "What is 3 + 4?",
        "Let $a = 2$. Compute $7a!$.",
        "计算 3 + 4 的值。",
        "设 x+3=7，求 x 的值。",
        "Чему равно 3 + 4?",
        "3 + 4 を計算しなさい。",
        "ما هو 3 + 4؟",
        "3 + 4는 얼마입니까?",
    ],
)
@pytest.mark.parametrize(
    "frame",
    [
        "Solve the following problem. {} Put the answer in a box.",
        "Question: {}\nAnswer within \\boxed{{}}, please.",
        "### Problem 12\n\n**{}**\n\nThink step by step.",
        "<problem>{}</problem>",
        "请解答以下问题：{}\n请把答案放在 \\boxed{{}} 中。",
        "Решите задачу. {}",
        "次の問題を解いてください。{}",
    ],
)
def test_a_short_problem_is_found_in_any_script_and_under_a_frame(problem, frame):
    training = rows("Something else", frame.format(problem), frame.format(problem.replace("3", "5").replace("2", "6")))
    assert same(training, rows(problem, prefix="e")) == {"r1": "e0"}


SCRIPTS = {
    "chinese": "已知甲乙两人同时从相距一百二十公里的两地出发相向而行甲每小时走六公里乙每小时走四公里问几小时后两人相遇",
    "japanese": "ある農夫が市場で毎朝卵を九個ずつ売っていますが日曜日だけは売りません一週間で何個の卵を売りますか",
    "russian": "Фермер продаёт на рынке девять яиц каждое утро кроме воскресенья сколько яиц он продаст за год если в "
    "нём триста шестьдесят пять дней",
    "thai": "ชาวนาขายไข่เก้าฟองที่ตลาดทุกเช้ายกเว้นวันอาทิตย์เขาขายไข่ทั้งหมดกี่ฟองในหนึ่งสัปดาห์",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_long_problem_is_found_in_other_scripts(script):
    text = SCRIPTS[script]
    half = text[: len(text) // 4] + "甲" + text[len(text) // 4 :]  # the rest is still a run
    training = rows(text[:16], f"A frame {text} and its end", half.upper(), " ".join(reversed(text)))
    assert same(training, rows(f"{text}?", prefix="e")) == {"r1": "e0", "r2": "e0"}


def test_full_width_forms_and_accents_are_layout():
    assert overlap.key("Ｗｈａｔ ｉｓ ３＋４？") == overlap.key("What is 3+4?")
    assert overlap.key("求 x 的值") == overlap.key("求x的值") and overlap.key("école") == overlap.key("e\u0301cole")


def test_a_short_problem_that_many_rows_have_is_a_phrase():
    evaluation = {"set": rows("What is its area?", prefix="e")}
    training = rows(*(f"A square has side {i}. What is its area?" for i in range(10)))
    few, many = (filtering.contaminated(training[:count], evaluation)["set"] for count in (9, 10))
    assert len(few.same) == 9 and not many.same and len(many.phrase) == 10


def test_a_run_of_words_that_many_problems_have_is_a_phrase():
    phrase = "where m and n are relatively prime positive integers what is m plus n"

    def hits_of(count):
        training = rows(*(f"Problem {'abcdefghijk'[i]} {phrase}" for i in range(count)), f"Problem z {phrase}")
        hits = filtering.contaminated(training, {"first": [], "set": rows(f"Problem z {phrase}", prefix="e")})
        assert hits["first"] == ({}, {})
        return hits["set"]

    # Together with the evaluation problem: 10 problems, and 11.
    few, many = hits_of(8), hits_of(9)
    assert set(few.same) == {f"r{i}" for i in range(9)} and not few.phrase
    assert many.same == {"r9": "e0"}, "the whole problem is still found"
    assert set(many.phrase) == {f"r{i}" for i in range(9)}


def test_a_telling_run_counts_beside_a_phrase():
    phrase, telling = " ".join(WORDS[:14]), " ".join(f"word{i}" for i in range(13))
    evaluation = rows(f"{phrase} {telling}", prefix="e")
    training = rows(*(f"{i} {phrase}" for i in range(12)), f"{phrase} 5 {telling}")
    assert same(training, evaluation) == {"r12": "e0"}


def test_a_row_is_found_in_the_first_set_that_has_it():
    text = " ".join(WORDS)
    sets = {"none": rows("x"), "one": rows(text, prefix="a"), "two": rows(text, prefix="b")}
    for problem in (text, f"Again: {text}"):
        hits = filtering.contaminated(rows(problem), sets)
        assert {name: hit.same for name, hit in hits.items()} == {"none": {}, "one": {"r0": "a0"}, "two": {}}


def test_the_embedded_world_is_not_contaminated():
    evaluation = {"heldout": "arithmetic:eval,count=512", "text": "reasoning_gym:gcd,count=30,split=eval"}
    sources = "arithmetic:train,count=4096;arithmetic:pretraining,count=4096"
    pytest.importorskip("reasoning_gym", reason="needs the extra 'gym'")
    sieve = data.sift(f"{sources};reasoning_gym:gcd,count=60", evaluation, remove_duplicates=False, decontaminate=True)
    assert len(sieve.rows) == 2 * 4096 + 60
    itself = data.sift("arithmetic:eval,count=600", evaluation, remove_duplicates=False, decontaminate=True)
    assert len(itself.rows) == 600 - 512


def test_benchmarks_against_each_other():
    if not SHARED.is_dir():
        pytest.skip("shared/data is not there")
    sets = {
        name: data.load(str(SHARED / f"{name}.jsonl")) for name in ("gsm8k_train", "gsm8k_test", "math500", "amc23")
    }
    assert not any(filtering.duplicates(part) for part in sets.values())
    training = sets.pop("gsm8k_train")
    hits = filtering.contaminated(training, sets)
    assert set(hits["gsm8k_test"].same) == {f"gsm8k/train/{i}" for i in (20, 406, 1314, 5162)}
    assert not any(hits[name].same for name in ("math500", "amc23"))


# Lengths and the account


def test_rows_too_long():
    three = rows("a", "b", "c")
    assert filtering.too_long(three, [[0] * 3, [0] * 4, [0] * 5], 4) == {"r2": "5 tokens"}
    with pytest.raises(ValueError):
        filtering.too_long(three, [[0]], 4)


reasons = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.sets(st.integers(0, 9))), max_size=6)


@given(st.lists(st.integers(0, 4), max_size=3), reasons)
def test_read_is_left_out_plus_kept(sizes, steps):
    parts, start = {}, 0
    for i, size in enumerate(sizes):
        parts[f"s{i}"] = [{"id": str(n)} for n in range(start, start + size)]
        start += size
    sieve = Sieve(parts)
    expected = {row["id"]: None for part in parts.values() for row in part}
    for reason, keep, ids in steps:
        sieve.leave_out(reason, {str(i): "x" for i in ids}, keep=keep)
        if not keep:
            expected = {id: why or (reason if int(id) in ids else None) for id, why in expected.items()}
    assert [row["id"] for row in sieve.rows] == [id for id, why in expected.items() if why is None]
    for source, count in sieve.counts().items():
        assert count["read"] == len(parts[source]) == count["kept"] + sum(count["left_out"].values())
        why = Counter(expected[row["id"]] for row in parts[source])
        assert count["kept"] == why[None]
        assert {r: n for r, n in count["left_out"].items() if n} == {r: n for r, n in why.items() if r and n}
    left_out = {finding.id: finding.reason for finding in sieve.findings if not finding.kept}
    assert left_out == {id: why for id, why in expected.items() if why}


def test_the_table_names_every_reason_and_an_example():
    sieve = Sieve({"a.jsonl": rows("x", "y", "z"), "b.jsonl": rows("u", prefix="b")})
    sieve.leave_out("duplicate", {"r1": "r0"})
    sieve.leave_out("in MATH500", {"r0": "m7", "b0": "m8"}, keep=True)
    table = sieve.table("RL")
    lines = [[cell.strip() for cell in line.strip()[1:-1].split("│")] for line in table.splitlines() if "│" in line]
    assert lines == [
        ["a.jsonl", "3", ""],
        ["left out: duplicate", "1", "r1 (r0)"],
        ["kept", "2", ""],
        ["although: in MATH500", "1", "r0 (m7)"],
        ["b.jsonl", "1", ""],
        ["left out: duplicate", "0", ""],
        ["kept", "1", ""],
        ["although: in MATH500", "1", "b0 (m8)"],
    ]


def test_the_record_of_one_stage_leaves_the_other_alone(tmp_path):
    first, second = Sieve({"s": rows("x", "y")}), Sieve({"s": rows("x", "y")})
    first.leave_out("duplicate", {"r1": "r0"})
    second.leave_out("in é", {"r0": "e0"}, keep=True)
    for _ in range(2):  # a second time changes nothing
        filtering.record(first, tmp_path, "sft", resuming=False)
        filtering.record(second, tmp_path, "rl", resuming=True)
        written = json.loads((tmp_path / "data.json").read_text())
        count = {"read": 2, "left_out": {"duplicate": 1}, "kept_although": {}, "kept": 1}
        assert list(written) == ["sft", "rl"] and written["sft"]["sources"] == {"s": count}
        lines = [json.loads(line) for line in (tmp_path / "data_left_out.jsonl").read_text().splitlines()]
        assert sorted(lines, key=lambda line: line["stage"], reverse=True) == [
            {"stage": "sft", "source": "s", "id": "r1", "reason": "duplicate", "detail": "r0", "kept": False},
            {"stage": "rl", "source": "s", "id": "r0", "reason": "in é", "detail": "e0", "kept": True},
        ]


def test_a_stage_resumes_only_with_the_same_rows(tmp_path):
    begun = Sieve({"s": rows("x", "y")})
    filtering.record(begun, tmp_path, "rl", resuming=True)
    before = (tmp_path / "data.json").read_text()
    for other in (Sieve({"s": rows("x")}), Sieve({"s": rows("y", "x")}), Sieve({"s": rows("x", "y", strategy="s")})):
        with pytest.raises(
            ValueError, match=rf"the rl stage in .* began with different rows: 2 then .*, {len(other.rows)} now"
        ):
            filtering.record(other, tmp_path, "rl", resuming=True)
    assert (tmp_path / "data.json").read_text() == before
    filtering.record(Sieve({"elsewhere": rows("x", "y")}), tmp_path, "rl", resuming=True)
    filtering.record(Sieve({"s": rows("x")}), tmp_path, "rl", resuming=False)
    assert json.loads((tmp_path / "data.json").read_text())["rl"]["sources"]["s"]["kept"] == 1
