import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import combinations, product

import pytest

from sgpo_jax import rewards
from sgpo_jax.data.generators import arithmetic, gym, logic
from sgpo_jax.data.generators.arithmetic import World
from sgpo_jax.policy.prompts import user_turn
from sgpo_jax.strategies import leakage, prompts, self_written

FORM = re.compile(r"Problem type: [^:]+\. Strategy: [^:]+\. Steps: \(a\) [^()]+ \(b\) [^()]+( \([c-e]\) [^()]+)*")
OPERATIONS = {  # written again, independently of the package
    "sum": lambda a, b: int(str(a + b)[-1]),
    "difference": lambda a, b: a - b if a > b else b - a,
    "larger": lambda a, b: sorted((a, b))[1],
    "smaller": lambda a, b: sorted((a, b))[0],
    "product": lambda a, b: int(str(a * b)[-1]),
}


def type_of(row):
    return re.fullmatch(r"\w+ \w+ (\w+ \w+): .*", row["problem"]).group(1)


def methods_of(text):
    return tuple(re.findall(r"\([abc]\) (\w+)", text))


def pairs_of(row):
    digits = re.findall(r"\d", row["problem"])
    return [(int(a), int(b)) for a, b in zip(digits[::2], digits[1::2], strict=True)]


# The embedded world


def test_a_problem_in_full():
    row = arithmetic.problems(64, 0)[0]
    assert list(row) == ["id", "problem", "answer", "strategy", "solution", "source"]
    (a, b), (c, d), (e, f) = pairs_of(row)
    assert row["problem"] == f"Prices at copper market: {a} {b}, {c} {d}, {e} {f}"
    assert row["id"] == f"copper-market/{a}{b}{c}{d}{e}{f}"
    first, second, third = methods_of(row["strategy"])
    assert row["strategy"] == (
        f"Problem type: copper market. Strategy: trading rules. Steps: (a) {first} (b) {second} (c) {third}"
    )
    x, y, z = row["answer"]
    assert row["solution"] == (
        f"(a) {first} {a} {b} = {x} (b) {second} {c} {d} = {y} (c) {third} {e} {f} = {z}. \\boxed{{{x}{y}{z}}}"
    )
    assert row["source"] == "market"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_are_those_of_the_strategy(split):
    for row in arithmetic.problems(1000, 5, split):
        results = [OPERATIONS[m](*p) for m, p in zip(methods_of(row["strategy"]), pairs_of(row), strict=True)]
        assert row["answer"] == "".join(map(str, results))
        assert methods_of(row["solution"]) == methods_of(row["strategy"])
        assert row["answer"][0] != "0"
        assert FORM.fullmatch(row["strategy"]) and not re.search(r"\d", row["strategy"])


def test_the_right_methods_belong_to_the_type_alone():
    rules = defaultdict(set)
    for seed in (0, 1):
        for row in arithmetic.problems(256, seed) + arithmetic.problems(256, seed, "eval"):
            rules[type_of(row)].add(methods_of(row["strategy"]))
    assert len(rules) == 64 and all(len(methods) == 1 for methods in rules.values())


def test_no_family_or_stage_gives_a_method_away():
    used = Counter((family, methods) for (family, _), methods in arithmetic.right_methods().items())
    assert set(used.values()) == {2} and len(used) == 32


def test_the_hidden_table_is_fixed():
    table = arithmetic.right_methods()
    assert table["market", "copper"] == ("sum", "larger", "sum")
    assert table["garden", "poppy"] == ("larger", "difference", "sum")
    assert table["harbor", "busy"] == ("product", "smaller", "difference")
    assert table["workshop", "hammer"] == ("smaller", "sum", "larger")


def test_competing_methods_never_agree():
    for row in arithmetic.problems(1000, 2):
        for methods, pair in zip(arithmetic.FAMILIES[row["source"]].stages, pairs_of(row), strict=True):
            assert len({OPERATIONS[m](*pair) for m in methods}) == 2


def test_problems_are_seeded_different_and_balanced():
    rows = arithmetic.problems(640, 7)
    assert rows == arithmetic.problems(640, 7)
    assert rows[:100] == arithmetic.problems(100, 7)
    assert len({row["problem"] for row in rows}) == len({row["id"] for row in rows}) == 640
    assert set(Counter(map(type_of, rows)).values()) == {10}
    other = {row["problem"] for row in arithmetic.problems(640, 8)}
    assert len(other & {row["problem"] for row in rows}) < 64


def test_train_and_eval_share_no_digits():
    digits = [
        {str(pairs_of(row)) for seed in range(3) for row in rows(seed)}
        for rows in (
            lambda seed: arithmetic.problems(3000, seed) + arithmetic.pretraining(3000, seed),
            lambda seed: arithmetic.problems(3000, seed, "eval"),
        )
    ]
    assert not digits[0] & digits[1] and len(digits[1]) > 5000


def test_pretraining_rows():
    rows = arithmetic.pretraining(6400, 0, preference=0.7, guided_share=0.25)
    assert rows == arithmetic.pretraining(6400, 0, preference=0.7, guided_share=0.25)
    assert len({row["id"] for row in rows}) == 6400
    right = {f"{kind} {family}": methods for (family, kind), methods in arithmetic.right_methods().items()}
    agreement = {True: [], False: []}
    for row in rows:
        methods = methods_of(row["solution"])
        results = [OPERATIONS[m](*p) for m, p in zip(methods, pairs_of(row), strict=True)]
        assert row["answer"] == "".join(map(str, results)) and row["solution"].endswith(f"\\boxed{{{row['answer']}}}")
        stages = arithmetic.FAMILIES[row["source"]].stages
        assert all(m in pair for m, pair in zip(methods, stages, strict=True))
        if "strategy" in row:
            assert methods_of(row["strategy"]) == methods and type_of(row) in row["strategy"]
        agreement["strategy" in row] += [m == r for m, r in zip(methods, right[type_of(row)], strict=True)]
    assert len(agreement[True]) / len(rows) / 3 == pytest.approx(0.25, abs=0.02)
    # Standard errors are 0.007 and 0.004.
    assert sum(agreement[True]) / len(agreement[True]) == pytest.approx(0.5, abs=0.03)
    assert sum(agreement[False]) / len(agreement[False]) == pytest.approx(0.7, abs=0.02)


def test_rows_that_teach_to_write_strategies():
    """Some rows become them, the others stay; what is shown is what `prompts.own_strategy` shows."""
    plain, rows = arithmetic.pretraining(2000, 3), arithmetic.pretraining(2000, 3, writing=0.25)
    writing = [row for row in rows if "Strategy:" in row["problem"]]
    assert len(writing) / len(rows) == pytest.approx(0.25, abs=0.04)
    right = {f"{kind} {family}": methods for (family, kind), methods in arithmetic.right_methods().items()}
    agreement, drawn = [], defaultdict(set)
    for before, row in zip(plain, rows, strict=True):
        assert row["id"] == before["id"]
        if row not in writing:
            assert row == before
            continue
        problem, solution, request = row["problem"].split("\n\n")
        methods = methods_of(solution)
        assert problem == before["problem"] and request == "Strategy:" and "strategy" not in row
        assert user_turn(row["problem"], None, "") == prompts.own_strategy(problem, solution, bare=True)
        assert row["answer"] == "".join(
            str(OPERATIONS[m](*p)) for m, p in zip(methods, pairs_of(before), strict=True)
        ) and solution.endswith(f"\\boxed{{{row['answer']}}}")
        assert methods_of(row["solution"]) == methods and type_of(before) in row["solution"]
        parsed = self_written.read(row["solution"], "stop", problem, row["answer"], solution)
        assert parsed == (row["solution"], "", ""), "what it learns to write passes the checks as it is"
        agreement += [m == r for m, r in zip(methods, right[type_of(before)], strict=True)]
        drawn[row["source"]].add(methods)
    assert sum(agreement) / len(agreement) == pytest.approx(0.5, abs=0.04), "nothing is learnt about types"
    assert {len(methods) for methods in drawn.values()} == {8}


def test_without_them_the_rows_are_what_they_were():
    text = json.dumps(arithmetic.pretraining(500, 3)).encode()
    assert hashlib.sha256(text).hexdigest()[:16] == "b2c397abb82fbfde"
    assert arithmetic.pretraining(500, 3, writing=0.0) == arithmetic.pretraining(500, 3)


PHRASES = {"join both , add": "sum", "join both , multiply": "product", "join one , subtract": "difference",
           "keep one , above": "larger", "keep one , below": "smaller"}  # fmt: skip
FOREIGN = {"plus": "sum", "minus": "difference", "max": "larger", "min": "smaller", "times": "product"}


def plain(solution):
    """Writes a solution in any wording as "plain" has it, and says in which form it was."""
    text, mentions = re.subn("^As the strategy says , ", "", solution)
    text, second = re.subn(r"with (\d \d) : (\w+) =", r"\2 \1 =", text)
    text, third = re.subn(r"from (\d) (\d) the (\w+) is", r"\3 \1 \2 =", text)
    for phrase, method in (PHRASES | FOREIGN).items():
        text = text.replace(f"{phrase} ", f"{method} ")
    return text, (mentions, second, third)


@pytest.mark.parametrize("wording", ["spread", "ways", "mention", "foreign"])
def test_a_wording_changes_words_alone(wording):
    """Problems, answers, strategies and methods stay; forms and openings are where and as often as they should be."""
    before, rows = (
        arithmetic.pretraining(2000, 0, World(4, 2, name), preference=0.4) for name in ("plain", wording)
    )  # fmt: skip
    assert [{**row, "solution": plain(row["solution"])[0]} for row in rows] == before
    found = {guided: Counter(plain(row["solution"])[1] for row in rows if ("strategy" in row) == guided)
             for guided in (True, False)}  # fmt: skip
    for guided, counts in found.items():
        share = {form: count / counts.total() for form, count in counts.items()}
        if wording == "ways":
            first, other = (1 / 3, 1 / 3) if guided else (0.8, 0.1)
            expected = {(0, 0, 0): first, (0, 2, 0): other, (0, 0, 2): other}  # the same form in all stages
            assert share == pytest.approx(expected, abs=0.05)
        else:
            assert share == {(int(wording == "mention" and guided), 0, 0): 1}
    expert, worded = arithmetic.problems(200, 0), arithmetic.problems(200, 0, world=World(wording=wording))
    assert [{**row, "solution": plain(row["solution"])[0]} for row in worded] == expert
    assert (worded == expert) == (wording in ("ways", "mention")), "the expert's words"
    if wording == "spread":
        for row in rows:
            phrases = re.findall(r"\([ab]\) (\D+) \d", row["solution"])
            assert phrases and set(phrases) <= set(PHRASES)


def test_types_that_the_base_model_knows():
    right = {f"{kind} {family}": m for (family, kind), m in arithmetic.right_methods(4).items()}
    agreement = {True: [], False: []}
    for row in arithmetic.pretraining(6000, 0, world=World(4), preference=0.3, known=0.5, guided_share=0.0):
        kind, family = type_of(row).split()
        pairs = zip(methods_of(row["solution"]), right[type_of(row)], strict=True)
        agreement[arithmetic.is_known(family, kind, 0.5)] += [m == r for m, r in pairs]
    assert 0.3 < len(agreement[True]) / sum(map(len, agreement.values())) < 0.7
    assert sum(agreement[True]) / len(agreement[True]) == pytest.approx(arithmetic.KNOWN, abs=0.02)
    assert sum(agreement[False]) / len(agreement[False]) == pytest.approx(0.3, abs=0.02)
    assert arithmetic.pretraining(99, 1, known=0.0) == arithmetic.pretraining(99, 1)


@pytest.mark.parametrize(("competing", "stages"), [(2, 1), (3, 2), (4, 3), (4, 1)])
def test_a_world_of_other_size(competing, stages):
    """Chains of `stages`, each with `competing` methods that all give other digits, one of them right for the type."""
    right, used = {}, defaultdict(set)
    for row in arithmetic.problems(128, 2, world=World(competing, stages)):
        methods = methods_of(row["strategy"])
        assert len(methods) == len(pairs_of(row)) == len(row["answer"]) == stages
        results = [OPERATIONS[m](*p) for m, p in zip(methods, pairs_of(row), strict=True)]
        assert row["answer"] == "".join(map(str, results)) and row["answer"][0] != "0"
        assert right.setdefault(type_of(row), methods) == methods
        among = arithmetic.choices(row["source"], competing)[:stages]
        for method, names, pair in zip(methods, among, pairs_of(row), strict=True):
            assert method in names and len({OPERATIONS[m](*pair) for m in names}) == competing
        for stage, method in enumerate(methods):
            used[row["source"], stage].add(method)
    assert all(len(names) == competing for names in used.values()), "every method that competes is right somewhere"


def test_the_default_world_is_the_one_of_two_methods_and_three_stages():
    assert arithmetic.problems(64, 3) == arithmetic.problems(64, 3, world=World(competing=2, stages=3), noise=0.0)


@pytest.mark.parametrize("families", [1, 3])
def test_a_world_of_fewer_families(families):
    """Of the same table, and with fewer problems at most."""
    world = World(competing=3, stages=2, families=families)
    rows = arithmetic.problems(200, 1, world=world) + arithmetic.pretraining(200, 1, world=world)
    assert list(dict.fromkeys(row["source"] for row in rows)) == list(arithmetic.FAMILIES)[:families]
    assert len({type_of(row) for row in rows}) == 16 * families
    whole = {type_of(row): methods_of(row["solution"]) for row in arithmetic.problems(200, 1, world=World(3, 2))}
    assert {type_of(row): methods_of(row["solution"]) for row in rows[:200]}.items() <= whole.items()
    with pytest.raises(ValueError, match=f"competing=3, stages=2 and families={families}$"):
        arithmetic.problems(10**6, 1, world=world)


@pytest.mark.parametrize("competing", [2, 4])
def test_noisy_strategies(competing):
    """Each method of a strategy is wrong with the probability asked for; problem, answer and solution stay right."""
    clean = arithmetic.problems(2000, 4, world=World(competing))
    noisy = arithmetic.problems(2000, 4, world=World(competing), noise=0.25)
    assert [{**row, "strategy": ""} for row in noisy] == [{**row, "strategy": ""} for row in clean]
    pairs = [
        (named, right)
        for row in noisy
        for named, right in zip(methods_of(row["strategy"]), methods_of(row["solution"]), strict=True)
    ]
    assert 0.22 < sum(named != right for named, right in pairs) / len(pairs) < 0.28
    for row in noisy:
        among = arithmetic.choices(row["source"], competing)
        assert all(named in names for named, names in zip(methods_of(row["strategy"]), among, strict=True))


def test_pretraining_in_a_world_of_four_methods():
    right = {f"{kind} {family}": m for (family, kind), m in arithmetic.right_methods(4).items()}
    agreement = {True: [], False: []}
    for row in arithmetic.pretraining(3000, 0, World(4, 2), preference=0.4):
        methods = methods_of(row["solution"])
        assert len(methods) == 2 and ("strategy" not in row or methods_of(row["strategy"]) == methods)
        agreement["strategy" in row] += [m == r for m, r in zip(methods, right[type_of(row)], strict=False)]
    assert 0.37 < sum(agreement[False]) / len(agreement[False]) < 0.43
    assert 0.22 < sum(agreement[True]) / len(agreement[True]) < 0.28, "a strategy's methods are drawn evenly"


@pytest.mark.parametrize("competing", [2, 3, 4])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_smallest_worlds_give_as_many_problems_as_they_say(competing, split):
    with pytest.raises(ValueError, match=f"count is 900; allowed: at most [0-9]+ with competing={competing}") as error:
        arithmetic.problems(900, 0, split, World(competing, 1))
    most = int(re.search("at most ([0-9]+)", str(error.value)).group(1))
    assert len({row["id"] for row in arithmetic.problems(most, 0, split, World(competing, 1))}) == most


def test_pretraining_extremes():
    right = {f"{kind} {family}": methods for (family, kind), methods in arithmetic.right_methods().items()}
    for row in arithmetic.pretraining(200, 1, preference=1.0, guided_share=0.0):
        assert "strategy" not in row and methods_of(row["solution"]) == right[type_of(row)]
    assert all("strategy" in row for row in arithmetic.pretraining(200, 1, guided_share=1.0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: arithmetic.problems(0, 0), "count is 0"),
        (lambda: arithmetic.problems(2.5, 0), "count is 2.5"),
        (lambda: World(competing=5), "competing is 5; allowed: an integer from 2 to 4"),
        (lambda: World(stages=0), "stages is 0; allowed: an integer from 1 to 3"),
        (lambda: World(families=5), "families is 5; allowed: an integer from 1 to 4"),
        (lambda: arithmetic.problems(5, 0, noise=1.5), "noise is 1.5; allowed: a number from 0 to 1"),
        (lambda: arithmetic.problems(10**7, 0), "allowed: an integer from 1 to 1000000"),
        (lambda: World(wording="loud"), "wording is 'loud'; allowed: plain, spread, ways, mention"),
        (lambda: World(wording=""), "wording is ''; allowed: plain"),
        (lambda: arithmetic.pretraining(1, 0, known=2), "known is 2; allowed: a number from 0 to 1"),
        (lambda: arithmetic.problems(1, 0, "test"), "split is 'test'; allowed: train, eval"),
        (lambda: arithmetic.pretraining(1, 0, preference=1.1), "preference is 1.1; allowed"),
        (lambda: arithmetic.pretraining(1, 0, guided_share="half"), "guided_share is 'half'; allowed"),
        (lambda: arithmetic.pretraining(1, 0, writing=-0.1), "writing is -0.1; allowed: a number from 0 to 1"),
    ],
)
def test_wrong_arguments_of_the_world(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# reasoning-gym


@pytest.fixture(scope="module")
def rg():
    return pytest.importorskip("reasoning_gym", reason="needs the extra 'gym'")


def test_gym_solutions_against_reasoning_gym(rg):
    """Every worked solution arrives at the answer that reasoning-gym computed."""
    for family in ("chain_sum", "gcd", "leg_counting", "gsm_symbolic"):
        for item in rg.create_dataset(family, size=200, seed=5):
            assert gym.FAMILIES[family].solve(item["metadata"])[0] == item["answer"]
    # Some of these have no exact answer; see gym.problems.
    for family in ("simple_equations", "basic_arithmetic"):
        items = list(rg.create_dataset(family, size=400, seed=5))
        solved = [gym.FAMILIES[family].solve(item["metadata"]) for item in items]
        agree = [s is not None and s[0] == item["answer"] for s, item in zip(solved, items, strict=True)]
        assert sum(agree) >= 0.97 * len(agree)


@pytest.mark.parametrize("family", list(gym.FAMILIES))
def test_gym_rows(rg, family):
    rows = gym.problems(family, 60, 1)
    assert rows == gym.problems(family, 60, 1)
    for row in rows:
        assert row["solution"].endswith(f" \\boxed{{{row['answer']}}}")
        assert row["source"] == f"reasoning_gym/{family}" and row["id"].startswith(f"{family}/")
        assert FORM.fullmatch(row["strategy"]) and not re.search(r"\d", row["strategy"])
    assert len({row["id"] for row in rows}) == len({row["problem"] for row in rows}) == 60


@pytest.mark.parametrize("family", ["chain_sum", "basic_arithmetic", "gcd", "leg_counting", "simple_equations"])
def test_each_line_of_a_solution_is_true(rg, family):
    equation = re.compile(r"(-?\d+) (\+|-|\*|/|mod) (-?\d+) = (-?\d+)")
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
        "mod": lambda a, b: a % b,
    }
    checked = 0
    for row in gym.problems(family, 100, 2):
        for a, operation, b, result in equation.findall(row["solution"]):
            assert operations[operation](int(a), int(b)) == int(result), row["solution"]
            checked += 1
    assert checked >= 100


def test_worked_solutions_by_hand():
    cases = [
        ("chain_sum", {"expression": "12 + 5 - 20"}, "-3", "12 + 5 = 17. 17 - 20 = -3."),
        (
            "basic_arithmetic",
            {"expression": "2 - -( 3 + 4 ) * 6 / 3"},
            "16",
            "3 + 4 = 7. -(7) = -7. -7 * 6 = -42. -42 / 3 = -14. 2 - -14 = 16.",
        ),
        ("gcd", {"numbers": [36, 48]}, "12", "48 mod 36 = 12. 36 mod 12 = 0."),
        ("gcd", {"numbers": [8, 12, 6]}, "2", "12 mod 8 = 4. 8 mod 4 = 0. 6 mod 4 = 2. 4 mod 2 = 0."),
        ("simple_equations", {"equation": "56 - 98*e = -1218", "variable": "e"}, "13",
         "-98*e = -1218 - 56 = -1274. e = -1274 / -98 = 13."),
        ("simple_equations", {"equation": "x + 5 = 8", "variable": "x"}, "3", "x = 8 - 5 = 3."),
        ("simple_equations", {"equation": "5 - x = 1", "variable": "x"}, "4", "-x = 1 - 5 = -4. x = -4 / -1 = 4."),
        ("simple_equations", {"equation": "3*x - 6 = 9", "variable": "x"}, "5", "3*x = 9 + 6 = 15. x = 15 / 3 = 5."),
        ("simple_equations", {"equation": "x = 8", "variable": "x"}, "8", "x = 8."),
        ("gsm_symbolic", {"answer_cot": "4 * 2 = 8\n#### 8.0"}, "8", "4 * 2 = 8"),
    ]  # fmt: skip
    for family, metadata, answer, steps in cases:
        assert gym.FAMILIES[family].solve(metadata) == (answer, steps)
    assert gym.FAMILIES["basic_arithmetic"].solve({"expression": "1 / ( 2 - 2 )"}) is None
    assert gym.FAMILIES["simple_equations"].solve({"equation": "0 = 0", "variable": "x"}) is None
    with pytest.raises(ValueError, match="linear"):
        gym.FAMILIES["simple_equations"].solve({"equation": "x*x = 4", "variable": "x"})


def test_legs_by_hand(rg):
    solved = gym.FAMILIES["leg_counting"].solve({"animals": {"cat": 3, "bird": 2, "snake": 9}})
    assert solved == ("16", "cat: 3 * 4 = 12. bird: 2 * 2 = 4. 12 + 4 = 16. snake: 9 * 0 = 0. 16 + 0 = 16.")


def test_gym_splits_never_share_a_problem(rg):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train = {row["problem"] for seed in range(3) for row in gym.problems("chain_sum", 120, seed, **options)}
    held_out = {row["problem"] for seed in range(3) for row in gym.problems("chain_sum", 15, seed, "eval", **options)}
    assert not train & held_out and len(train) > 120 and len(held_out) >= 15


def claim(statement, kinds):
    """Evaluates a statement independently of the package, as an expression of Python."""

    def written(part):
        match part:
            case ("telling-truth", i):
                return str(kinds[i])
            case ("lying", i):
                return f"(not {kinds[i]})"
            case ("not", inner):
                return f"(not {written(inner)})"
            case (("and" | "or") as word, *parts):
                return f"({f' {word} '.join(map(written, parts))})"
            case ("->", a, b):
                return f"({written(a)} <= {written(b)})"
            case ("<=>", a, b):
                return f"({written(a)} == {written(b)})"

    return eval(written(statement))


def value(said):
    """Evaluates a statement whose parts are replaced by true and false."""
    text = re.sub("true|false", lambda match: match[0].capitalize(), said)
    text = re.sub(" if and only if ", " == ", text).replace(" then ", " <= ")
    return eval(re.sub(r"not (\w+|\([^()]*\))", r"(not \1)", text.replace("if ", "")))


@pytest.mark.parametrize(("people", "depth", "width"), [(2, 2, 2), (3, 2, 2), (2, 3, 3), (3, 3, 3)])
def test_knights_and_knaves_by_brute_force(rg, people, depth, width):
    """The only case without contradiction is ours, reasoning-gym gives it full marks, and every step is true."""
    options = {"n_people": people, "depth_constraint": depth, "width_constraint": width}
    dataset = rg.create_dataset("knights_knaves", size=150, seed=3, **options)
    family, first, substituted = gym.FAMILIES["knights_knaves"], Counter(), Counter()
    for item in dataset:
        metadata = item["metadata"]
        names, statements, terms = metadata["names"], metadata["statements"], metadata["knight_knave_terms"]
        consistent = [
            kinds
            for kinds in product([True, False], repeat=people)
            if all(claim(said, kinds) == kind for said, kind in zip(statements, kinds, strict=True))
        ]
        (kinds,) = consistent
        words = [terms["knight"] if kind else terms["knave"] for kind in kinds]
        answer, steps = family.solve(metadata)
        problem, gold = family.read(item)
        assert answer == f"\\text{{{' '.join(words)}}}" == gold
        asked = item["question"]
        for name, replacement in zip(names, logic.NAMES, strict=False):
            assert not re.search(rf"\b{name}\b", problem)
            asked = re.sub(rf"\b{name}\b", replacement, asked)
        claims = asked[asked.index(f"and {logic.NAMES[people - 1]}. ") :].partition(". ")[2].partition(" So who is ")[0]
        knight, knave = terms["Knight"], terms["knave"]
        assert problem.startswith(f"{knight}s always tell the truth, and {knave}s always lie. {claims} Say ")
        sentence = ", and ".join(f"{name} is a {word}" for name, word in zip(names, words, strict=True))
        assert dataset.score_answer(sentence, item) == 1.0
        hints = family.hints({name: value for name, value in metadata.items() if name != "solution"})
        for line in steps.split(". "):
            case, checks, verdict = re.fullmatch(r"([a-z ]+): (.*); (contradiction|consistent)\.?", line).groups()
            supposed = [word == terms["knight"] for word in case.split()]
            parts = [re.fullmatch(r"(\w+) says (?:(.*), )?(true|false)", part).groups() for part in checks.split("; ")]
            assert parts[0][0] == hints["islander"]
            agree = []
            for name, said, truth in parts:
                i = logic.NAMES.index(name)
                assert claim(statements[i], supposed) == (truth == "true")
                assert said is None or value(said) == (truth == "true")
                substituted.update([said])
                agree.append((truth == "true") == supposed[i])
            assert all(agree[:-1]) and agree[-1] == (verdict == "consistent")
        assert verdict == "consistent" and supposed == list(kinds) and len(parts) == people
        first[logic.NAMES.index(hints["islander"])] += 1
    assert set(first) == set(range(people)), "whom to suppose first depends on the puzzle"
    assert {f"true {word} false" for word in ("and", "or", "if and only if")} < set(substituted)


def test_knights_and_knaves_by_hand(rg):
    """Ann: Bob lies. Bob: if Ann tells the truth, I lie. Bob's words leave one case, Ann's two."""
    metadata = {
        "statements": (("lying", 1), ("->", ("telling-truth", 0), ("lying", 1))),
        "knight_knave_terms": {"knight": "sage", "knave": "fool", "a_knight": "a sage", "a_knave": "a fool"},
    }
    steps = (
        "sage sage: Bob says if true then false, false; contradiction. "
        "fool sage: Bob says if false then false, true; Ann says false; consistent."
    )
    assert logic.begin(metadata) == {"islander": "Bob", "knight": "a sage"}
    assert logic.knights_knaves(metadata) == ("\\text{fool sage}", steps)
    # Each alone leaves two cases, both together none: the one met first begins, and there is no answer.
    metadata["statements"] = (("lying", 1), ("telling-truth", 0))
    assert logic.begin(metadata)["islander"] == "Ann" and logic.knights_knaves(metadata) is None
    with pytest.raises(ValueError, match="statement .'xor', .*; allowed: and, or, not, "):
        logic.begin({**metadata, "statements": (("xor", 0, 1), ("lying", 0))})


def mended(string):
    """Returns the fewest swaps to an alternating string, by trying all of them, or -1."""
    reached, swaps = {string}, 0
    while reached:
        if any("00" not in s and "11" not in s for s in reached):
            return swaps
        pairs = list(combinations(range(len(string)), 2))
        further = {s[:i] + s[j] + s[i + 1 : j] + s[i] + s[j + 1 :] for s in reached for i, j in pairs}
        if further <= reached:
            return -1
        reached, swaps = reached | further, swaps + 1


def test_binary_alternation_by_brute_force(rg):
    dataset = rg.create_dataset("binary_alternation", size=200, seed=3, min_n=2, max_n=8, p_solvable=0.7)
    answers = Counter()
    for item in dataset:
        answer, steps = gym.FAMILIES["binary_alternation"].solve(item["metadata"])
        assert int(answer) == mended(item["metadata"]["string"])
        assert dataset.score_answer(answer, item) == 1.0
        answers[answer] += 1
    assert len(answers) >= 4 and answers["-1"] > 20
    assert logic.binary_alternation({"string": "1100"}) == (
        "1", "2 of 1. 2 of 0. From 1: 1010, 2 wrong, 2 / 2 = 1. From 0: 0101, 2 wrong, 2 / 2 = 1."
    )  # fmt: skip
    assert logic.binary_alternation({"string": "00110"}) == (
        "1", "2 of 1. 3 of 0. From 0: 01010, 2 wrong, 2 / 2 = 1."
    )  # fmt: skip
    assert logic.binary_alternation({"string": "1000"}) == ("-1", "1 of 1. 3 of 0. 3 - 1 > 1.")


@pytest.mark.parametrize("people", [2, 3])
def test_the_verifier_on_puzzles(rg, people):
    """Exactly one of the 4 or 8 answers passes, and none in a form that changes the order."""
    for row in gym.problems("knights_knaves", 20, 1, n_people=people):
        pair = re.search('Say "(.*)" or "(.*)" for Ann', row["problem"]).groups()
        right = row["answer"].removeprefix("\\text{").removesuffix("}")
        answers = [" ".join(words) for words in product(pair, repeat=people)]
        verdicts = rewards.score([f"so \\boxed{{{answer}}}" for answer in answers], [row["answer"]] * len(answers))
        assert [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict.reward] == [right]
        backwards = right.split()[::-1]
        forms = ["({})({})", "{}*{}", "{},{}", "{} \\cdot {}", "\\text{{{}}}\\text{{{}}}"]
        if people == 2 and len(set(backwards)) == 2:
            texts = [f"\\boxed{{{form.format(*backwards)}}}" for form in forms]
            assert not any(verdict.reward for verdict in rewards.score(texts, [row["answer"]] * len(forms)))
        assert rewards.score([row["solution"]], [row["answer"]])[0].outcome == "correct"


@pytest.mark.parametrize("family", ["knights_knaves", "binary_alternation"])
def test_strategies_of_the_second_domain_give_nothing_away(rg, family):
    rows = gym.problems(family, 100, 6)
    for row in rows:
        assert leakage.find(row["strategy"], row["problem"], row["answer"], row["solution"]) == ("", "")
    # Two islanders to begin with, seven pairs of words.
    assert len({row["strategy"] for row in rows}) == {"knights_knaves": 14, "binary_alternation": 1}[family]


@pytest.mark.parametrize("family", ["knights_knaves", "binary_alternation"])
def test_splits_of_the_second_domain(rg, family):
    train, held_out = (
        {row["problem"] for seed in range(2) for row in gym.problems(family, 200, seed, split)} for split in gym.SPLITS
    )
    assert not train & held_out and len(train) > 300 < len(held_out)


def test_a_share_of_the_rows_has_its_strategy(rg):
    whole = gym.problems("knights_knaves", 400, 1)
    rows = gym.problems("knights_knaves", 400, 1, guided_share=0.25)
    assert 60 < sum("strategy" in row for row in rows) < 140
    assert all(row | {"strategy": full["strategy"]} == full for row, full in zip(rows, whole, strict=True))
    assert not any("strategy" in row for row in gym.problems("gcd", 50, 1, guided_share=0.0))


def test_neighbouring_seeds_give_different_problems(rg):
    first, second = ({row["problem"] for row in gym.problems("leg_counting", 100, seed)} for seed in (1, 2))
    assert not first & second


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("gdc", 1, 0), {}, "family is 'gdc'; allowed: .*gcd"),
        (("gcd", 0, 0), {}, "count is 0"),
        (("gcd", 1, 0, "test"), {}, "split is 'test'; allowed: train, eval"),
        (("gcd", 1, 0), {"max_terms": 3}, "option 'max_terms' of gcd; allowed: .*max_value"),
        (("gcd", 1, 0), {"size": 3}, "option 'size'"),
        (("gcd", 1, 0), {"max_value": 3.5}, "max_value of gcd is 3.5; allowed: int"),
        (("gcd", 1, 0), {"min_value": 9, "max_value": 3}, "options .* of gcd"),
        (("gcd", 1, 0), {"guided_share": 1.5}, "guided_share is 1.5; allowed: a number from 0 to 1"),
        (("gcd", 1, 0), {"guided_share": True}, "guided_share is True; allowed"),
        (("knights_knaves", 1, 0), {"n_people": 1}, "n_people of knights_knaves is 1; allowed: from 2 to 3"),
        (("knights_knaves", 1, 0), {"n_people": 4}, "n_people of knights_knaves is 4; allowed"),
        (("knights_knaves", 1, 0), {"depth_constraint": 1}, "depth_constraint of knights_knaves is 1; allowed"),
        (("knights_knaves", 1, 0), {"width_constraint": 4}, "width_constraint of knights_knaves is 4; allowed"),
        (("binary_alternation", 1, 0), {"p_solvable": 2.0}, "options .* of binary_alternation"),
        (("gcd", 100, 0), {"max_value": 3}, "count is 100, but gcd .* gave only [0-9]+ different"),
    ],
)
def test_wrong_arguments_of_gym(rg, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        gym.problems(*arguments, **options)
