from sgpo_jax.policy.prompts import user_turn
from sgpo_jax.strategies import prompts


def test_unguided_turn():
    assert user_turn("What is 2 + 3?") == (
        "Problem:\nWhat is 2 + 3?\n\nReason step by step, then give the final answer in \\boxed{}."
    )


def test_guided_turn_puts_the_strategy_first():
    assert user_turn("What is 2 + 3?", "Problem type: sum. Strategy: add. Steps: (a) add") == (
        "Strategy:\nProblem type: sum. Strategy: add. Steps: (a) add\n\n"
        "Problem:\nWhat is 2 + 3?\n\n"
        "Reason step by step, then give the final answer in \\boxed{}."
    )


def test_empty_instruction_leaves_no_trace():
    assert user_turn("2 + 3", None, "") == "Problem:\n2 + 3"
    assert user_turn("2 + 3", "add", "") == "Strategy:\nadd\n\nProblem:\n2 + 3"


def test_the_student_is_asked_as_the_strong_model_is():
    assert prompts.own_strategy("2 + 3", "It is \\boxed{5}.") == prompts.extraction("2 + 3", "It is \\boxed{5}.")
    bare = prompts.own_strategy("2 + 3", "It is \\boxed{5}.", bare=True)
    assert bare == "Problem:\n2 + 3\n\nIt is \\boxed{5}.\n\nStrategy:"


def test_texts_are_not_interpreted():
    assert user_turn("{x} %s \\n", "{0}", "{y}") == "Strategy:\n{0}\n\nProblem:\n{x} %s \\n\n\n{y}"
