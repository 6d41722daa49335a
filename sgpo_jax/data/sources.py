"""Where rows come from: files, folders, the Hugging Face hub, TFDS, and generators of problems.

`read` gives the rows as they are there; `sgpo_jax.data` says how a source is written, and turns its rows into problems.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sgpo_jax.data.generators import arithmetic, gym

SUFFIXES = (".jsonl", ".parquet")
ALLOWED = (
    "a .jsonl or .parquet file, a folder of them, tfds:NAME, or a Hugging Face dataset id, each with its options after "
    "'?'; arithmetic:..., reasoning_gym:..."
)
_PARQUET_ROWS = 1024  # read at once


class Raw(NamedTuple):
    """A row as it is in its source.

    place: where it is, for messages.
    number: an id for it in a source without ids; moving the source to another folder does not change it.
    """

    place: str
    number: str
    row: Any


def read(source: str, fields: Sequence[str]) -> tuple[dict[str, str], Iterator[Raw]]:
    """(options that name fields, rows) of one source.

    Args:
        source: as `sgpo_jax.data` says.
        fields: names of the options that are not about reading.

    Raises:
        ValueError: an unknown source or option; or, while the rows are read, one that cannot be read.
    """
    kind, _, arguments = source.partition(":")
    if kind in _GENERATORS:
        generated = _GENERATORS[kind](source, arguments)
        return {}, (Raw(f"{source}, row {i}", str(i), row) for i, row in enumerate(generated))
    name, _, text = source.partition("?")
    if "\0" in name:
        raise ValueError(f"source {source!r}: no file or data set has a NUL in its name")
    options = _options(source, text)
    rows: Iterator[Raw]
    path = Path(os.path.expanduser(name))
    if kind == "tfds":
        _reject_unknown(source, options, ("split", "data_dir", *fields))
        rows = _tfds(source, arguments.partition("?")[0], options.pop("split", "train"), options.pop("data_dir", None))
    elif name and os.path.isdir(path):  # pathlib would raise on a name that is too long
        _reject_unknown(source, options, ("files", *fields))
        rows = _folder(source, path, options.pop("files", "*"))
    elif path.suffix in SUFFIXES:
        _reject_unknown(source, options, fields)
        rows = _file(path)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        _reject_unknown(source, options, ("split", "name", *fields))
        rows = _hub(source, name, options.pop("name", None), options.pop("split", "train"))
    else:
        raise ValueError(f"source {source!r}; allowed: {ALLOWED}")
    return options, rows


def _options(source: str, text: str) -> dict[str, str]:
    """The options of "key=value,key=value"."""
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"source {source!r}: {item!r}; allowed: options such as split=train")
        if key in options:
            raise ValueError(f"source {source!r}: option {key} is there twice; allowed: once")
        options[key] = value
    return options


def _reject_unknown(source: str, options: Iterable[str], allowed: Sequence[str]) -> None:
    for key in options:
        if key not in allowed:
            raise ValueError(f"source {source!r}: option {key!r}; allowed: {', '.join(allowed)}")


# Files


def _folder(source: str, path: Path, pattern: str) -> Iterator[Raw]:
    try:
        files = sorted(file for file in path.glob(pattern) if file.suffix in SUFFIXES)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"source {source!r}: files={pattern} ({error}); allowed: names in the folder") from error
    if not files:
        raise ValueError(f"source {source!r}: the folder has no .jsonl or .parquet file named {pattern}")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[Raw]:
    if not os.path.isfile(path):
        raise ValueError(f"source {str(path)!r}: there is no such file")
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    for number, row in rows:
        yield Raw(f"{path}:{number}", f"{path.stem}/{number}", row)


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # Not bytes, which json takes in UTF-16 too; "sig" is a byte order mark, which a file may begin with.
                # Decimal keeps an answer such as 0.10 as it is written.
                row = json.loads(line.decode("utf-8-sig"), parse_float=Decimal)
            except (ValueError, RecursionError, InvalidOperation) as error:
                raise ValueError(f"{path}:{number}: not valid JSON in UTF-8 ({error})") from error
            yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading parquet needs the extra 'hub'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet after row {number} ({error})") from error


# Data sets by name


def _hub(source: str, name: str, config: str | None, split: str) -> Iterator[Raw]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source {source!r} is taken for a Hugging Face dataset, which needs the extra 'hub'"
        ) from error
    try:
        table = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"source {source!r} is neither a local file or folder, nor a Hugging Face dataset "
            f"that can be loaded ({error})"
        ) from error
    for number, row in enumerate(table):
        yield Raw(f"{source}, row {number}", f"{name}/{split}/{number}", row)


def _tfds(source: str, name: str, split: str, folder: str | None) -> Iterator[Raw]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"source {source!r} needs the extra 'tfds'") from error
    try:
        table = tfds.data_source(name, split=split, data_dir=folder)
    except Exception as error:  # preparing a data set runs that data set's own code
        reason = str(error).partition("\n")[0]  # followed by all data sets there are
        raise ValueError(f"source {source!r}: TFDS cannot load it ({reason})") from error
    for number in range(len(table)):
        yield Raw(f"{source}, row {number}", f"{name}/{split}/{number}", _plain(table[number]))


def _plain(value: Any) -> Any:
    """Python's own types for what TFDS gives: UTF-8 text for bytes, lists for arrays, exact decimals for floats."""
    match value:
        case Mapping():
            return {key: _plain(inner) for key, inner in value.items()}
        case np.ndarray() | list() | tuple():
            return [_plain(inner) for inner in value]
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value  # an image, perhaps; refused if it is asked for as text
        case np.floating():
            return Decimal(str(value))
        case np.generic():
            return value.item()
    return value


# Generators


def _arguments(source: str, text: str) -> tuple[list[str], dict[str, Any]]:
    """(plain words, options) of "word,key=value,..."; values may be numbers, true and false."""
    items = [item.strip() for item in text.split(",")]
    words = [item for item in items if item and "=" not in item]
    options = _options(source, ",".join(item for item in items if "=" in item))
    values = {key: _value(value) for key, value in options.items()}
    for key in ("count", "seed"):
        if key in values and type(values[key]) is not int:
            raise ValueError(f"source {source!r}: {key} is {values[key]!r}; allowed: an integer")
    return words, values


def _value(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _arithmetic(source: str, text: str) -> list[dict]:
    words, options = _arguments(source, text)
    knobs = ["count", "seed", "competing", "stages"]
    allowed = {split: [*knobs, "noise"] for split in arithmetic.SPLITS}
    allowed["pretraining"] = [*knobs, "preference", "guided_share", "writing"]
    if len(words) != 1 or words[0] not in allowed:
        raise ValueError(f"source {source!r}: {words}; allowed: exactly one of {list(allowed)}")
    _reject_unknown(source, options, allowed[words[0]])
    options = {"count": None, "seed": 0, **options}
    if words[0] == "pretraining":
        return arithmetic.pretraining(**options)
    return arithmetic.problems(split=words[0], **options)


def _reasoning_gym(source: str, text: str) -> list[dict]:
    """The families' problems in equal parts; further options go to every family's generator."""
    families, options = _arguments(source, text)
    if not families or len(set(families)) < len(families):
        raise ValueError(f"source {source!r}: {families}; allowed: one or more different families")
    count, seed = options.pop("count", 0), options.pop("seed", 0)
    if count < len(families):
        raise ValueError(
            f"source {source!r}: count is {count}; allowed: at least {len(families)}, one problem a family"
        )
    share, extra = divmod(count, len(families))
    return [
        row for i, family in enumerate(families) for row in gym.problems(family, share + (i < extra), seed, **options)
    ]


_GENERATORS = {"arithmetic": _arithmetic, "reasoning_gym": _reasoning_gym}
