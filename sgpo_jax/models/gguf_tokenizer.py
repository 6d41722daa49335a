"""Builds the two kinds of tokenizers that GGUF files hold, from their tokens and merges or scores.

In GGUF each token has a kind, a number of llama.cpp: tokens of the kinds control and user-defined are cut out of a text
before the others are looked for, and control tokens can be left out of a decoded text.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"  # what SentencePiece writes for a space


def byte_level(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> Tokenizer:
    """Builds the byte-level BPE of SmolLM, which cuts off single digits first.

    Args:
        tokens: [V].
        kinds: [V], llama.cpp's number for the kind of each token.
        merges: pairs of tokens with a space between, the first one first.

    Raises:
        Exception: the merges do not fit the tokens; whatever the package tokenizers raises.
    """
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend, tokens, kinds)


def sentence_piece(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float], unknown: str | None, first: str | None
) -> Tokenizer:
    """Builds SentencePiece's BPE without a space before the text: the pair whose union scores highest is merged first.

    Args:
        tokens: [V]; normal ones have "▁" for a space, and a byte is written "<0x0A>".
        kinds: [V], llama.cpp's number for the kind of each token.
        scores: [V].
        unknown: token of what is neither in the vocabulary nor a byte of it; None: there is none.
        first: token before every text that is encoded with special tokens; None: there is none.

    Raises:
        Exception: the scores do not fit the tokens; whatever the package tokenizers raises.
    """
    normal = {token: score for token, kind, score in zip(tokens, kinds, scores, strict=True) if kind == _NORMAL}
    pairs = [
        (score, token[:cut], token[cut:])
        for token, score in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    # Pairs with the same union have the same score. transformers puts the one with the longer left part first.
    pairs.sort(key=lambda pair: (pair[0], len(pair[1])), reverse=True)
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [(left, right) for _, left, right in pairs],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if first is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokens.index(first))]
        )
    return _with_added(backend, tokens, kinds)


def _with_added(backend: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return backend
