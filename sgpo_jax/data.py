"""Problems: reading them, checking them, splitting them, and putting them into batches.

A row is a dict of strings: `id`, `problem`, `answer` always; `solution` (the expert's response),
`strategy`, `source`, `level` where they exist. Other fields are left out.

A source is a string, several are joined with ";":

    problems.jsonl, problems.parquet, or a folder of such files
    arithmetic:train,count=4096,seed=1             the embedded world (or eval, or pretraining)
    reasoning_gym:gcd,chain_sum,count=500,seed=1   generated text problems; split=eval for others
    owner/name:split=train,problem=question        a Hugging Face dataset, with its column names
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain

from sgpo_jax.problems import arithmetic, gym

REQUIRED = ("id", "problem", "answer")
OPTIONAL = ("solution", "strategy", "source", "level")
_SUFFIXES = (".jsonl", ".parquet")


def load(source: str) -> list[dict]:
    """All rows of a source (see the module's text), in a fixed order.

    Raises:
        ValueError: an unknown source or option, or a wrong row: the message names file and line,
            field, value, and what is allowed.
    """
    rows: list[dict] = []
    places: dict[str, str] = {}
    for part in source.split(";"):
        for place, raw in _read(part.strip()):
            row = _checked(raw, place)
            if row["id"] in places:
                raise ValueError(
                    f"{place}: field 'id' is {row['id']!r}, which {places[row['id']]} has too; "
                    "allowed: a different id for every problem"
                )
            places[row["id"]] = place
            rows.append(row)
    return rows


def _read(source: str) -> Iterator[tuple[str, Any]]:
    """(place, unchecked row) for every row of one source."""
    name, _, rest = source.partition(":")
    path = Path(source)
    if name == "arithmetic":
        rows: Any = enumerate(_arithmetic(source, rest))
    elif name == "reasoning_gym":
        rows = enumerate(_reasoning_gym(source, rest))
    elif source and path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES)
        if not files:
            raise ValueError(f"source {source!r}: the folder has no .jsonl or .parquet file")
        for file in files:
            yield from _read_file(file)
        return
    elif path.suffix in _SUFFIXES:
        yield from _read_file(path)
        return
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        rows = _hub(source, name, rest)
    else:
        raise ValueError(
            f"source {source!r}; allowed: a .jsonl or .parquet file, a folder of them, "
            "arithmetic:..., reasoning_gym:..., or a Hugging Face dataset id with its options"
        )
    for number, row in rows:
        yield f"{source}, row {number}", row


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ValueError(f"source {str(path)!r}: there is no such file")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError(f"{path}: reading parquet needs the extra 'hub'") from error
        for number, row in enumerate(parquet.read_table(path).to_pylist(), start=1):
            yield f"{path}:{number}", row
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error})") from error


def _checked(row: Any, place: str) -> dict:
    """The row's known fields, as strings; None stands for an absent optional field."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__}; allowed: a JSON object")
    checked = {}
    for field in REQUIRED + OPTIONAL:
        value = row.get(field)
        if value is None and field in OPTIONAL:
            continue
        if field == "level" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            found = repr(value) if field in row else "missing"
            raise ValueError(f"{place}: field '{field}' is {found}; allowed: a non-empty string")
        checked[field] = value
    return checked


def _options(source: str, text: str) -> tuple[list[str], dict[str, Any]]:
    """(plain words, options) of "word,key=value,..."; values may be numbers, true and false."""
    words: list[str] = []
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            words.append(item)
        elif key in options:
            raise ValueError(f"source {source!r}: option {key} is there twice; allowed: once")
        else:
            options[key] = _value(value)
    for key in ("count", "seed"):
        if key in options and type(options[key]) is not int:
            raise ValueError(f"source {source!r}: {key} is {options[key]!r}; allowed: an integer")
    return words, options


def _value(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _reject_unknown(source: str, options: dict, allowed: Sequence[str]) -> None:
    for key in options:
        if key not in allowed:
            raise ValueError(f"source {source!r}: option {key!r}; allowed: {', '.join(allowed)}")


def _arithmetic(source: str, text: str) -> list[dict]:
    words, options = _options(source, text)
    allowed = {split: ["count", "seed"] for split in arithmetic.SPLITS}
    allowed["pretraining"] = ["count", "seed", "preference", "guided_share"]
    if len(words) != 1 or words[0] not in allowed:
        raise ValueError(f"source {source!r}: {words}; allowed: exactly one of {list(allowed)}")
    _reject_unknown(source, options, allowed[words[0]])
    options = {"count": None, "seed": 0, **options}
    if words[0] == "pretraining":
        return arithmetic.pretraining(**options)
    return arithmetic.problems(split=words[0], **options)


def _reasoning_gym(source: str, text: str) -> list[dict]:
    """The families' problems in equal parts; further options go to every family's generator."""
    families, options = _options(source, text)
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


def _hub(source: str, name: str, text: str) -> Iterator[tuple[int, dict]]:
    """Rows of a Hugging Face dataset; a dataset without ids gets its row numbers."""
    words, options = _options(source, text)
    if words:
        raise ValueError(f"source {source!r}: {words}; allowed: options such as split=train")
    _reject_unknown(source, options, ("split", "name", *REQUIRED, *OPTIONAL))
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source {source!r} is taken for a Hugging Face dataset, which needs the extra 'hub'"
        ) from error
    split = options.pop("split", "train")
    try:
        table = datasets.load_dataset(name, options.pop("name", None), split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"source {source!r} is neither a local file or folder, nor a Hugging Face dataset "
            f"that can be loaded ({error})"
        ) from error
    for column in options.values():
        if column not in table.column_names:
            raise ValueError(f"source {source!r}: column {column!r}; allowed: {', '.join(table.column_names)}")
    for number, row in enumerate(table):
        row = {**row, **{field: row[column] for field, column in options.items()}}
        yield number, {"id": f"{name}/{split}/{number}", **row}


def _share_of(row: dict, salt: str) -> float:
    """A number in [0, 1) that depends on the row's id and the salt alone."""
    digest = hashlib.sha256(f"{salt}/{row['id']}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _split(rows: Sequence[dict], share: float, salt: str) -> tuple[list[dict], list[dict]]:
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share!r}; allowed: a number from 0 to 1")
    first = [row for row in rows if _share_of(row, salt) < share]
    second = [row for row in rows if _share_of(row, salt) >= share]
    return first, second


def split_sft(rows: Sequence[dict], share: float = 1 / 3) -> tuple[list[dict], list[dict]]:
    """(rows for the SFT warm-up, rows for RL): about `share` of them go to the warm-up.

    A row's side depends on its id alone, so it stays the same when other rows come or go.
    """
    return _split(rows, share, "sft")


def split_validation(rows: Sequence[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """(rows for training, rows for validation): about `share` of them are held out, by id."""
    held_out, training = _split(rows, share, "validation")
    return training, held_out


def filter_by_length(
    rows: Sequence[dict], **limited: tuple[Sequence[Sequence[int]], int]
) -> tuple[list[dict], dict[str, int]]:
    """The rows that fit, and how many did not and why.

    Args:
        rows: problems.
        limited: for each part that has a limit, such as "prompt", (the token ids of every row's part, most tokens).

    Returns:
        (rows kept, counts), counts with the keys kept, PART_too_long for every part, which add up to the number of rows
        (a row too long in several parts is counted for the first).
    """
    kept = []
    counts = {"kept": 0, **{f"{part}_too_long": 0 for part in limited}}
    for i, row in enumerate(rows):
        long = [part for part, (tokens, limit) in limited.items() if len(tokens[i]) > limit]
        counts[f"{long[0]}_too_long" if long else "kept"] += 1
        if not long:
            kept.append(row)
    return kept, counts


def steps_per_epoch(rows: Sequence[dict], batch_size: int) -> int:
    """Full batches in one pass over the rows; the rest of a pass, under one batch, is left out.

    Raises:
        ValueError: there are fewer rows than one batch needs.
    """
    if not 1 <= batch_size <= len(rows):
        raise ValueError(f"batch_size is {batch_size!r}; allowed: from 1 to the number of rows, {len(rows)}")
    return len(rows) // batch_size


def batches(rows: Sequence[dict], batch_size: int, seed: int) -> grain.MapDataset:
    """An endless sequence of batches with random access: `batches(...)[step]` is a list of rows.

    The batch of a step is a function of (rows, batch_size, seed, step) alone, so the step is all
    that a checkpoint has to remember. Every `steps_per_epoch` steps the rows are shuffled anew.

    Raises:
        ValueError: there are fewer rows than one batch needs, or the seed is negative.
    """
    steps_per_epoch(rows, batch_size)
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    epoch = grain.MapDataset.source(rows).seed(seed).shuffle()
    return epoch.batch(batch_size, drop_remainder=True, batch_fn=list).repeat()
