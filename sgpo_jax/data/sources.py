"""Reads raw rows from files, folders, the Hugging Face hub, TFDS and generators of problems.

The docstring of `rows` says how to write a source; that module also turns raw rows into problems.
"""

import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from sgpo_jax.data.generators import arithmetic, gym
from sgpo_jax.runtime import buckets

SUFFIXES = (".jsonl", ".parquet")  # files that are read from a folder
# Files that are read by their own name, in capitals or not.
FILES = re.compile(r"(.+)\.(?:parquet|(?:jsonl|ndjson)(\.gz)?)", re.IGNORECASE | re.DOTALL)
ALLOWED = (
    "a .jsonl or .parquet file, a folder of them, both also at gs://, s3:// or hf://, tfds:NAME, or a Hugging Face "
    "dataset id, each with its options after '?'; arithmetic:..., reasoning_gym:...; by its own name also a .ndjson, "
    ".jsonl.gz or .ndjson.gz file"
)
_PARQUET_ROWS = 1024  # rows per read


class Raw(NamedTuple):
    """A row as it is in its source."""

    place: str  # the row's place, for messages
    number: str  # an id for a source without ids; it does not change when the source is moved to another folder
    row: Any


def read(source: str, fields: Sequence[str]) -> tuple[dict[str, str], Iterator[Raw]]:
    """Returns (options that name fields, iterator over the rows) of one source.

    Args:
      source: as in `rows`.
      fields: allowed names of options that name fields.

    Raises:
      ValueError: an unknown source or option; or, from the iterator, a row that cannot be read.
    """
    kind, _, arguments = source.partition(":")
    if kind in _GENERATORS:
        generated = _GENERATORS[kind](source, arguments)
        return {}, (Raw(f"{source}, row {i}", str(i), row) for i, row in enumerate(generated))
    name, _, text = source.partition("?")
    if "\0" in name:
        raise ValueError(f"source {source!r}: a name cannot contain NUL")
    options = _options(source, text)
    rows: Iterator[Raw]
    path = Path(os.path.expanduser(name))
    if kind == "tfds":
        _reject_unknown(source, options, ("split", "data_dir", *fields))
        rows = _tfds(source, arguments.partition("?")[0], options.pop("split", "train"), options.pop("data_dir", None))
    elif buckets.is_url(name):
        buckets.check_url("source", name, buckets.READABLE)
        is_file = FILES.fullmatch(path.name) is not None
        _reject_unknown(source, options, fields if is_file else ("files", *fields))
        rows = _bucket(name, "" if is_file else options.pop("files", "*"))
    elif name and os.path.isdir(path):  # pathlib would raise on too long a name
        _reject_unknown(source, options, ("files", *fields))
        rows = _folder(source, path, options.pop("files", "*"))
    elif FILES.fullmatch(path.name):
        _reject_unknown(source, options, fields)
        rows = _file(path)
    elif name and os.path.lexists(path):
        kind = f"a {path.suffix} file" if path.suffix else "a file without suffix"
        kind = kind if os.path.isfile(path) else "no file that can be read"
        raise ValueError(f"source {source!r} is {kind}; allowed: {ALLOWED}")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        _reject_unknown(source, options, ("split", "name", *fields))
        rows = _hub(source, name, options.pop("name", None), options.pop("split", "train"))
    else:
        raise ValueError(f"source {source!r}; allowed: {ALLOWED}")
    return options, rows


def _options(source: str, text: str) -> dict[str, str]:
    """Parses the options "key=value,key=value"."""
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"source {source!r}: {item!r}; allowed: options such as split=train")
        if key in options:
            raise ValueError(f"source {source!r}: option {key} is given twice; allowed: once")
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
        others = sorted({"".join(file.suffixes) for file in path.glob(pattern) if file.is_file()})
        kinds = f"; its files are {', '.join(suffix or 'without suffix' for suffix in others[:8])}" if others else ""
        raise ValueError(f"source {source!r}: the folder has no .jsonl or .parquet file named {pattern}{kinds}")
    for file in files:
        yield from _file(file)


def _bucket(url: str, pattern: str) -> Iterator[Raw]:
    """Reads a file of a bucket, or with a pattern a folder, from a local copy; messages name the bucket."""
    local = buckets.fetch(url, lambda name: PurePath(name).match(pattern) and name.endswith(SUFFIXES))
    rows = _folder(url, local, pattern) if pattern else _file(local)
    try:
        for raw in rows:
            yield raw._replace(place=raw.place.replace(str(local), url.rstrip("/")))
    except (ValueError, ImportError) as error:
        raise type(error)(str(error).replace(str(local), url.rstrip("/"))) from error


def _file(path: Path) -> Iterator[Raw]:
    if not os.path.isfile(path):
        raise ValueError(f"source {str(path)!r}: there is no such file")
    match = FILES.fullmatch(path.name)
    assert match is not None
    rows = _parquet(path) if path.suffix.lower() == ".parquet" else _jsonl(path, packed=bool(match[2]))
    for number, row in rows:
        yield Raw(f"{path}:{number}", f"{match[1]}/{number}", row)


def _lines(path: Path, packed: bool) -> Generator[tuple[int, bytes]]:
    """Yields (number, line) of a file, which gzip may have packed."""
    number = 0
    with gzip.open(path) if packed else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                yield number, line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be unpacked after line {number} ({error})") from error


def _jsonl(path: Path, packed: bool) -> Iterator[tuple[int, Any]]:
    with contextlib.closing(_lines(path, packed)) as lines:
        for number, line in lines:
            if not line.strip():
                continue
            try:
                # json would also decode bytes in UTF-16, so decode here; "sig" allows a leading byte order mark.
                # Decimal keeps an answer such as 0.10 exactly as written.
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
            f"that can be loaded ({_one_line(error)}); a file is a .jsonl or .parquet file whose name has no ';' or '?'"
        ) from error
    except Exception as error:  # its files are broken or do not fit together
        raise ValueError(f"source {source!r}: the data set's files cannot be read ({_one_line(error)})") from error
    number = -1
    try:
        for number, row in enumerate(table):
            yield Raw(f"{source}, row {number}", f"{name}/{split}/{number}", row)
    except Exception as error:  # a value that is decoded when it is read, such as an image
        raise ValueError(f"source {source!r}: cannot be read after row {number} ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    """Returns an error's message and that of its first cause on one line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    texts = [" ".join(str(part).split()) for part in (error, cause)]
    texts = [text if len(text) <= 300 else f"{text[:300]}..." for text in texts]
    return "; ".join(
        dict.fromkeys(f"{type(e).__name__}: {text}" for e, text in zip((error, cause), texts, strict=True))
    )


def _tfds(source: str, name: str, split: str, folder: str | None) -> Iterator[Raw]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"source {source!r} needs the extra 'tfds'") from error
    try:
        table = tfds.data_source(name, split=split, data_dir=folder)
    except Exception as error:  # preparing a data set runs its code
        reason = str(error).partition("\n")[0]  # the other lines list all data sets
        raise ValueError(f"source {source!r}: TFDS cannot load it ({reason})") from error
    for number in range(len(table)):
        yield Raw(f"{source}, row {number}", f"{name}/{split}/{number}", _plain(table[number]))


def _plain(value: Any) -> Any:
    """Converts values from TFDS to Python types: bytes to UTF-8 text, arrays to lists, floats to exact decimals."""
    match value:
        case Mapping():
            return {key: _plain(inner) for key, inner in value.items()}
        case np.ndarray() | list() | tuple():
            return [_plain(inner) for inner in value]
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value  # for example an image; refused if it is read as text
        case np.floating():
            return Decimal(str(value))
        case np.generic():
            return value.item()
    return value


# Generators


def _arguments(source: str, text: str) -> tuple[list[str], dict[str, Any]]:
    """Parses "word,key=value,..." into (words, options); values may be numbers, true and false."""
    items = [item.strip() for item in text.split(",")]
    words = [item for item in items if item and "=" not in item]
    options = _options(source, ",".join(item for item in items if "=" in item))
    values = {key: _value(value) for key, value in options.items()}
    for key in ("count", "seed"):
        if key in values and type(values[key]) is not int:
            raise ValueError(f"source {source!r}: {key} is {values[key]!r}; allowed: an integer")
    return words, values


def _value(text: str) -> int | float | bool | str:
    """Parses an option's value."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _arithmetic(source: str, text: str) -> list[dict]:
    """Generates the rows of the embedded world."""
    words, options = _arguments(source, text)
    common = ["count", "seed", "competing", "stages", "wording", "families"]
    allowed = {split: [*common, "noise"] for split in arithmetic.SPLITS}
    allowed["pretraining"] = [*common, "preference", "guided_share", "writing", "known"]
    if len(words) != 1 or words[0] not in allowed:
        raise ValueError(f"source {source!r}: {words}; allowed: exactly one of {list(allowed)}")
    _reject_unknown(source, options, allowed[words[0]])
    options = {"count": None, "seed": 0, **options}
    shared = [field.name for field in fields(arithmetic.World) if field.name in options]
    world = arithmetic.World(**{name: options.pop(name) for name in shared})
    if words[0] == "pretraining":
        return arithmetic.pretraining(world=world, **options)
    return arithmetic.problems(split=words[0], world=world, **options)


def _reasoning_gym(source: str, text: str) -> list[dict]:
    """Generates as many problems of each family; further options go to every family's generator."""
    families, options = _arguments(source, text)
    if not families or len(set(families)) < len(families):
        raise ValueError(f"source {source!r}: {families}; allowed: one or more different families")
    count, seed = options.pop("count", 0), options.pop("seed", 0)
    if count < len(families):
        raise ValueError(
            f"source {source!r}: count is {count}; allowed: at least {len(families)}, one problem per family"
        )
    share, extra = divmod(count, len(families))
    return [
        row for i, family in enumerate(families) for row in gym.problems(family, share + (i < extra), seed, **options)
    ]


_GENERATORS = {"arithmetic": _arithmetic, "reasoning_gym": _reasoning_gym}
