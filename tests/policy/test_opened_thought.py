"""A chat template that opens a thought: what is graded, and what a solution becomes."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sgpo_jax.policy import Policy, tokenizer
from sgpo_jax.policy.generation import demonstrate, encode_prompts, encode_solution, grade
from sgpo_jax.rollout import STOP, Rollout

ROW = {"id": "a", "problem": "What is 19 + 23?", "answer": "42", "solution": r"It is \boxed{42}."}
THOUGHT = r"It might be \boxed{42}. Again: 9 + 3 = 12, carry"


def policy(opening: str, special: bool = False) -> Policy:
    """Returns a policy whose template ends a prompt with `opening`; a token is a byte, or <think>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|eot|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<think>", special=special, normalized=False)])
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot|>{% endfor %}"
        f"{{% if add_generation_prompt %}}[assistant]{opening}{{% endif %}}"
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, eos_token="<|eot|>")
    stops = tokenizer.stop_ids(tok)
    return Policy(None, tok, stops, stops[0], np.float32, "")


def reward(student: Policy, text: str, function: str = "") -> float:
    tokens = np.array([[tokenizer.encode_response(student.tokenizer, text, student.stop_ids[0])]], np.int32)
    lengths = np.array([[tokens.shape[-1]]])
    rollout = Rollout(tokens, np.zeros(tokens.shape, np.float32), lengths, np.array([[STOP]]))
    return float(grade(student, rollout, [ROW], function).rewards[0, 0])


@pytest.mark.parametrize(
    ("opening", "prefix", "special"),
    [
        ("", "<think>\n", False),  # a special token would be left out of the text
        *((o, p, s) for o, p in [("<think>\n", ""), ("<think>", "\n"), ("<think>\n\n", ""), ("<think> ", "")]
          for s in (False, True)),
    ],
)  # fmt: skip
def test_a_box_in_an_unfinished_thought_is_no_answer(opening, prefix, special):
    student = policy(opening, special)
    assert reward(student, prefix + THOUGHT) == 0.0
    assert reward(student, prefix + THOUGHT + "</think>\n\nDone.") == 0.0
    assert reward(student, prefix + THOUGHT + "</think>\n\n\\boxed{42}") == 1.0


def test_without_an_opened_thought_nothing_changes():
    assert reward(policy(""), THOUGHT) == 1.0
    assert reward(policy("<think>\n\n</think>\n\n"), THOUGHT) == 1.0


def test_a_function_of_the_user_gets_the_response_as_it_is():
    assert reward(policy("<think>\n"), "value:one", "helpers.reward_functions:by_row") == 1.0


def test_a_solution_without_a_thought_closes_the_one_that_the_template_opened():
    for opening, written in [
        ("", ROW["solution"]),
        ("<think>\n", "\n</think>\n\n" + ROW["solution"]),
        ("<think>", "\n\n</think>\n\n" + ROW["solution"]),
    ]:
        student = policy(opening)
        (prompt,) = encode_prompts(student, [ROW], guided=False)
        response = encode_solution(student, prompt, ROW)
        assert tokenizer.decode(student.tokenizer, response, len(response) - 1) == written
        rollout = demonstrate(student, [np.array(response)], 100)
        assert grade(student, rollout, [ROW]).rewards.tolist() == [[1.0]]
        thought = ROW | {"solution": f"<think>\n19 + 23</think>\n{ROW['solution']}"}
        response = encode_solution(student, prompt, thought)
        assert tokenizer.decode(student.tokenizer, response, len(response) - 1).count("</think>") == 1
