"""The checks for leaks: what a strategy must not give away, and what it may say."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_jax.data.generators import gym
from sgpo_jax.strategies import leakage, parsing

PROBLEM = "Mia has 48 beads and half as many shells. How many has she in 3 years?"
SOLUTION = "She has 48/2 = 24 shells. There are 48 + 24 = 72 things. Step 2: 7 days, so 72 * 7 = 504, x^5, 2.5 = 5/2."


def reason(strategy, answer, problem=PROBLEM, solution=SOLUTION):
    return leakage.find(strategy, problem, answer, solution)[0]


@pytest.mark.parametrize(
    ("answer", "strategy"),
    [
        ("72", "there are 72"),
        ("72", "seventy-two things"),
        ("72", "72.0 things"),
        ("72", "144/2 things"),
        ("72", "use $8 \\times 9$ things"),
        ("-72", "it sinks by seventy two"),
        ("1/2", "use 0.5"),
        ("0.5", "use 1/2"),
        ("\\frac{1}{2}", "use 2/4 of it"),
        ("\\frac12", "use 50% of it"),
        ("50\\%", "use \\frac{1}{2} of it"),
        ("1/2", "one half of it"),
        ("\\dfrac{10}{3}", "about 3.33"),
        ("10080", "in all 10,080"),
        ("10,080", "in all $10{,}080$"),
        ("1024", "take 2^{10}"),
        ("\\$18", "pay 18 dollars"),
        ("90^\\circ", "a right angle, 90 degrees"),
        ("27 \\text{ cm}", "measure 27 cm"),
        ("4", "divide by 4"),
        ("4", "so there are 4 cases"),
        ("\\sqrt{12}", "note $2\\sqrt{3}$ here"),
        ("\\sqrt{12}", "note \\sqrt{12} here"),
        ("x^2+1", "write it as $1 + x^2$"),
        ("x^2+1", "write it as $y = x^2 + 1$"),
        ("(3, \\frac{\\pi}{2})", "the point (3, \\pi/2) is meant"),
        ("\\text{Evelyn}", "see that evelyn wins"),
        ("even", "so it is even"),
        ("C", "the answer is C"),
        ("\\text{(C)}", "choose option (C)"),
        ("2", "the answer is 2"),
        ("0", "so the result is 0"),
        ("48", "she ends with a total of 48"),
        ("x", "finish with \\boxed{x}"),
    ],
)
def test_the_answer_does_not_stand_in_any_form(answer, strategy):
    problem = "A riddle about a thing and its friend, no number in it."
    solution = "By thought."
    if answer == "48":
        problem = PROBLEM
    assert reason(strategy, answer, problem, solution) == "leak_answer"


@pytest.mark.parametrize(
    ("answer", "strategy"),
    [
        ("2", "in 2 steps, halve the 2 ends of a degree 2 curve"),
        ("4", "a degree 4 polynomial in 4 variables, x^4 + a_4, the 4th of 4 cases"),
        ("0", "set the derivative equal to 0"),
        ("0", "note that $2 - 2$ vanishes"),
        ("1", "let one side be 1 unit"),
        ("72", "a 720-page book"),
        ("72", "multiply 7 and 2"),
        ("48", "start from the 48 beads"),
        ("\\text{Evelyn}", "ask everybody"),
        ("even", "every event is uneven"),
        ("C", "(a) consider (b) compute C, (c) conclude"),
        ("\\sqrt{12}", "use $\\sqrt{x}$"),
        ("3.14", "use 3"),
        ("1/3", "use 0.25"),
        ("", "anything"),
    ],
)
def test_what_is_no_answer_may_stand(answer, strategy):
    assert reason(strategy, answer, PROBLEM, "By thought.") == ""


def test_a_word_that_the_problem_offers_is_the_answer_only_where_it_is_called_so():
    problem = "Is f even, odd or neither?"
    assert reason("test whether f is even or odd", "odd", problem, "") == ""
    assert reason("so the answer must be odd", "odd", problem, "") == "leak_answer"


def test_a_formula_that_the_problem_shows_may_stand():
    assert reason("start from $x^2+1$", "x^2+1", "Factor $x^2 + 1$ if you can.", "") == ""


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("keep the 24 shells", "leak_value"),  # everyday, but she calculated it
        ("keep two dozen shells", ""),
        ("add up to 72", "leak_value"),
        ("multiply by 504/7", "leak_value"),
        ("multiply to 504", "leak_value"),
        ("use 2.50 here", "leak_value"),
        ("use 5/2 here", "leak_value"),
        ("use 2.496 here", "leak_value"),
        ("use 2.4 here", ""),
        ("start with 48 and take half, 0.5", ""),
        ("the 7 days of a week", ""),
        ("there are 7 of them", "leak_value"),
        ("the number is 7", "leak_value"),
        ("a week = 7", "leak_value"),
        ("in 3 years", ""),
        ("2 = 2", ""),
        ("60 minutes, 360 degrees, 100 percent", ""),
        ("900 of them", ""),
    ],
)
def test_calculated_values(strategy, expected):
    assert reason(strategy, "1000000", PROBLEM, SOLUTION + " An hour has 60 minutes.") == expected


def test_a_value_near_a_given_one_is_no_leak():
    assert reason("use 2.496 here", "7", "At 2.5 each?", "2.5 each") == ""
    assert reason("use 2.496 here", "7", "At 3 each?", "2.5 each") == "leak_value"


def test_parts_of_an_answer_are_values_too():
    assert reason("the point 17 away", "(17, 23)", "p", "s") == "leak_value"


def test_too_many_formulas_are_refused():
    formulas = " ".join(f"$x+{i}$" for i in range(100, 200))
    assert reason(formulas, "y+1", "p", "s") == "leak_unchecked"


@pytest.mark.slow
def test_a_formula_that_takes_too_long_is_refused():
    assert reason("look at $9^{9^{9^{9}}}$ first", "x+1", "p", "s") == "leak_unchecked"


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("72", 72), ("\\$18", 18), ("1/2", Fraction(1, 2)), ("\\frac{1}{2}", Fraction(1, 2)), ("-3.5", Fraction(7, 2)),
        ("50\\%", Fraction(1, 2)), ("27 \\text{ cm}", 27), ("10,080", 10080), ("90^\\circ", 90), ("2^{10}", 1024),
        ("3\\sqrt{2}", None), ("2\\pi", None), ("(3,4)", None), ("x=3", None), ("C", None), ("", None),
        ("9" * 99, None),
    ],
)  # fmt: skip
def test_answers_that_are_one_number(answer, value):
    assert leakage.plain_value(answer) == value


numbers = st.integers(13, 9999).filter(lambda n: n not in leakage.EVERYDAY)
FORMS = ["{n}", "{n}.0", "{t}/2", "\\frac{{{t}}}{{2}}", "$ {n} $", "({n})", "{n},", "{n}.", "\\frac {{{t}}}{{2}}"]


@given(numbers, st.sampled_from(FORMS))
def test_every_form_of_a_number_is_found(n, form):
    shown = form.format(n=n, t=2 * n)
    for text in (f"take {shown} of them", f"so it is {shown}", shown):
        assert reason(text, str(n), "no number here", "s") == "leak_answer", text
        assert reason(text, "x+y", "no number here", f"we find {n}") == "leak_value", text
    assert reason(f"take {n + 1} of them", str(n), "no number here", "s") == ""


@given(st.text(max_size=120), st.text(max_size=60), st.text(max_size=30), st.text(max_size=120))
def test_no_text_breaks_the_check(strategy, problem, answer, solution):
    found, detail = leakage.find(strategy, problem, answer, solution)
    assert found in ("", "leak_answer", "leak_value", "leak_unchecked") and bool(found) >= bool(detail)


@pytest.mark.parametrize(
    "piece",
    ["1", "1,000", "1/", "2^", "\\frac{", "}{", "%", " ", "is ", "=", "$", "\\(", "one ", "-", "seventy-", "1 ",
     "frac{1}{2} ", "^{3", "("],
)  # fmt: skip
def test_a_megabyte_of_numbers_takes_no_time(at_most, piece):
    text = piece * (1_000_000 // len(piece))
    with at_most(6.0):
        leakage.find(text[:2000], "p", text[:2000], text)


def test_good_strategies_pass_and_the_same_with_the_answer_do_not():
    pytest.importorskip("reasoning_gym", reason="needs the extra 'gym'")
    for family in gym.FAMILIES:
        for row in gym.problems(family, 8, 3):
            parsed = parsing.parse(row["strategy"])
            assert parsed.reason == ""
            texts = row["problem"], row["answer"], row["solution"]
            assert leakage.find(parsed.strategy, *texts) == ("", "")
            assert leakage.find(f"{parsed.strategy}. The answer is {row['answer']}", *texts)[0] == "leak_answer"
