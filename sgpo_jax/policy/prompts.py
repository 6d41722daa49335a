"""The texts that a model is shown, as pure strings; the tokenizer's chat template goes around."""


INSTRUCTION = "Reason step by step, then give the final answer in \\boxed{}."


def user_turn(problem: str, strategy: str | None = None, instruction: str = INSTRUCTION) -> str:
    """The user's turn for one problem: optional strategy, problem, optional instruction.

    One template for the unguided prompt (q) and the guided prompt (q, s): with a strategy the
    same text is preceded by a strategy block, as the paper "prepends" s to the problem (Sec. 3.2).

    Args:
        problem: the problem's text.
        strategy: the strategy description, or None for the unguided prompt.
        instruction: closing request; "" leaves the block out.
    """
    blocks = [f"Problem:\n{problem}"]
    if strategy is not None:
        blocks.insert(0, f"Strategy:\n{strategy}")
    if instruction:
        blocks.append(instruction)
    return "\n\n".join(blocks)

