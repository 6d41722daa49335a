"""The texts of the user's turn, without the tokenizer's chat template."""

INSTRUCTION = "Reason step by step, then give the final answer in \\boxed{}."


def user_turn(
    problem: str, strategy: str | None = None, instruction: str = INSTRUCTION, hint: str = "strategy"
) -> str:
    """Returns the user's turn for one problem: optional strategy, problem, optional instruction.

    The unguided prompt (q) and the guided prompt (q, s) share one template: with a strategy, a strategy block precedes
    the same text, as the paper "prepends" s to the problem (Sec. 3.2).

    Args:
      problem: the problem's text.
      strategy: the strategy description, or None for the unguided prompt.
      instruction: closing request; "" leaves the block out.
      hint: what stands in place of the strategy: "strategy", or "solution" for a whole solution.
    """
    blocks = [f"Problem:\n{problem}"]
    if strategy is not None:
        blocks.insert(0, f"{hint.capitalize()}:\n{strategy}")
    if instruction:
        blocks.append(instruction)
    return "\n\n".join(blocks)
