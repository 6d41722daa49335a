"""Reads problems from sources and checks them.

A row is a dict of strings. It always has `id`, `problem` and `answer`; it may have `solution` (the expert's response),
`strategy`, `source` and `level`. Fields with other names, as far as JSON can write them, stand in its dict `extra`, for
a reward function of the user's own.

A source is a string; several are joined with ";". Files and data sets take options after "?":

    problems.jsonl, problems.parquet               a file
    folder?files=train-*                           the .jsonl and .parquet files of a folder, or those of the pattern
    gs://bucket/problems.jsonl, s3://..., hf://... the same files and folders in a bucket, or on the hub
    owner/name?split=train,name=main               a Hugging Face dataset, its split and configuration
    tfds:name?split=train,data_dir=folder          a TFDS dataset in array_record files; TensorFlow is not needed
    arithmetic:train,count=4096,seed=1             the embedded world (or eval, or pretraining)
    reasoning_gym:gcd,chain_sum,count=500,seed=1   generated text problems; split=eval for others

Options map fields with other names, or nested ones: `problem=question`, `answer=reward_model.ground_truth`,
`problem=prompt.1.content` (items of a list count from 0, or backwards from -1). If a problem or a solution is a list of
messages, the last message of the user or of the assistant is taken. `schema=luffy` sets the names of the LUFFY data set
(see SCHEMAS); further options override it. A number is accepted as id, answer or level, and written out exactly. An
empty option such as `solution=` leaves an optional field unread. `first=100` takes the first 100 rows only.

Rows get numbers as ids if the first row has no `id`, or with the empty option `id=`: FILE/LINE, or NAME/SPLIT/NUMBER
for the hub and TFDS.
"""

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from sgpo_jax import rewards
from sgpo_jax.data import sources

REQUIRED = ("id", "problem", "answer")
OPTIONAL = ("solution", "strategy", "source", "level")
NUMBERS = ("id", "answer", "level")  # fields that may be numbers
ROLES = {"problem": "user", "solution": "assistant"}
# Names of fields in well-known data sets.
SCHEMAS = {
    # Elliott/Openr1-Math-46k-8192. Of the prompt only the user's message is read, since prompts are built later. A null
    # target is a problem without solution. The target's leading "<think>\n" stays, because whether the model has to
    # write it depends on the chat template: the warm-up decides (tokenizer.continuation). data_source is always empty.
    "luffy": {
        "id": "extra_info.index",
        "problem": "prompt",
        "answer": "reward_model.ground_truth",
        "solution": "target",
    },
}
_ABSENT = object()


def load(source: str) -> list[dict]:
    """Reads all rows of a source (see the module's docstring), in a fixed order.

    Raises:
      ValueError: an unknown source or option, or a wrong row. The message names file and line, field, value, and what
        is allowed.
    """
    return [row for rows in load_parts(source).values() for row in rows]


def load_parts(source: str) -> dict[str, list[dict]]:
    """Reads the rows of each of the joined sources: {source: rows}.

    Raises:
      ValueError: as in `load`.
    """
    parts: dict[str, list[dict]] = {}
    places: dict[str, str] = {}
    for part in map(str.strip, source.split(";")):
        rows = parts.setdefault(part, [])
        for place, row in _read(part):
            if row["id"] in places:
                raise ValueError(
                    f"{place}: field 'id' is {row['id']!r}, which {places[row['id']]} has too; "
                    "allowed: a different id for each row ('id=' in a source's options numbers its rows)"
                )
            places[row["id"]] = place
            rows.append(row)
        _report_golds(part, rows)
    return parts


def _report_golds(source: str, rows: list[dict]) -> None:
    """Warns of gold answers that are read out of a longer text, and of those in which the verifier finds no answer."""
    golds = rewards.survey(row["answer"] for row in rows)
    if golds.read:
        warnings.warn(
            f"source {source!r}: the verifier reads {golds.read} of {len(rows)} gold answers out of a longer text, "
            f"such as {golds.example}",
            stacklevel=2,
        )
    if golds.unclear:
        warnings.warn(
            f"source {source!r}: {golds.unclear} of {len(rows)} gold answers name no single answer, such as "
            f"{golds.unclear_example}; the verifier will find no response equal to them",
            stacklevel=2,
        )


def _read(source: str) -> Iterator[tuple[str, dict]]:
    """Yields (place, checked row) for each row of one source."""
    options, rows = sources.read(source, ("schema", *REQUIRED, *OPTIONAL, "first"))
    rows = itertools.islice(rows, _first(source, options.pop("first", None)))
    schema = options.pop("schema", None)
    if schema is not None and schema not in SCHEMAS:
        raise ValueError(f"source {source!r}: schema is {schema!r}; allowed: {', '.join(SCHEMAS)}")
    for field in ("problem", "answer"):
        if options.get(field) == "":
            raise ValueError(f"source {source!r}: option {field} is empty; allowed: the name of a field")
    paths = {field: field for field in REQUIRED + OPTIONAL} | SCHEMAS.get(schema or "", {}) | options
    unseen = {field for field, path in options.items() if path}
    names, numbered, i = "", False, -1
    for i, (place, number, raw) in enumerate(rows):
        if not isinstance(raw, dict):
            raise ValueError(f"{place}: a {type(raw).__name__}; allowed: a JSON object")
        values = {field: _find(raw, path) for field, path in paths.items() if path}
        if i == 0:
            names = ", ".join(raw)
            numbered = "id" not in options and values["id"] is _ABSENT or not paths["id"]
        if numbered:
            values["id"] = number
        unseen -= {field for field, value in values.items() if value is not _ABSENT}
        row = _checked(values, paths, place, raw)
        if extra := _extra(raw, paths.values()):
            row["extra"] = extra
        yield place, row
    if i < 0:
        raise ValueError(f"source {source!r}: there are no rows in it; allowed: at least one")
    if names and unseen:
        wrong = ", ".join(f"{field}={paths[field]}" for field in sorted(unseen))
        raise ValueError(f"source {source!r}: no row has {wrong}; the first row has {names}")


def _first(source: str, text: str | None) -> int | None:
    """Returns the number of rows that the option `first` takes; None for all."""
    if text is None:
        return None
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text):
        raise ValueError(f"source {source!r}: first is {text!r}; allowed: a whole number from 1")
    return int(text)


def _extra(raw: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a row from which none of its own was read, without those that JSON cannot write."""
    taken = {name for path in paths for name in (path, path.partition(".")[0])}
    others = {name: _plain(value) for name, value in raw.items() if name not in taken}
    inner = others.pop("extra", None)  # of a file that was written with such rows
    others = (inner if isinstance(inner, dict) else {} if inner is None else {"extra": inner}) | others
    return {name: value for name, value in others.items() if value is not _ABSENT}


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it, numbers as floats where they are no integers; `_ABSENT` for what it cannot."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        return items if _ABSENT not in items else _ABSENT
    if isinstance(value, Mapping):
        return {str(name): item for name, inner in value.items() if (item := _plain(inner)) is not _ABSENT}
    return _ABSENT


def _find(value: Any, path: str) -> Any:
    """Returns the value at a dotted path: `_ABSENT` if a step does not exist, None after a null."""
    if isinstance(value, Mapping) and path in value:  # a name may contain dots
        return value[path]
    step, dot, rest = path.partition(".")
    if value is None:
        return None
    if isinstance(value, Mapping) and step in value:
        inner = value[step]
    elif isinstance(value, list) and re.fullmatch(r"-?\d{1,9}", step) and -len(value) <= int(step) < len(value):
        inner = value[int(step)]
    else:
        return _ABSENT
    return _find(inner, rest) if dot else inner


def _checked(values: Mapping[str, Any], paths: Mapping[str, str], place: str, raw: Mapping) -> dict:
    """Returns the fields as strings, without optional ones that are null or absent."""
    checked = {}
    for field, value in values.items():
        if field in OPTIONAL and (value is None or value is _ABSENT):
            continue
        text = _text(field, value)
        if text is None or not text.strip():
            name = f"'{field}'" if paths[field] in ("", field) else f"'{field}' (from {paths[field]!r})"
            if value is _ABSENT:
                raise ValueError(f"{place}: field {name} is missing; the row has {_short(', '.join(raw))}")
            raise ValueError(f"{place}: field {name} is {_short(repr(value))}; allowed: {_allowed(field)}")
        if re.search(r"[\ud800-\udfff]", text):
            raise ValueError(f"{place}: field '{field}' is {_short(repr(text))}; allowed: text without half characters")
        checked[field] = text
    return checked


def _allowed(field: str) -> str:
    """Describes what `_text` accepts."""
    allowed = "a non-empty string"
    if field in NUMBERS:
        allowed += " or a number"
    if field in ROLES:
        allowed += f", or messages with one of the {ROLES[field]}"
    return allowed


def _text(field: str, value: Any) -> str | None:
    """Returns a field's value as text, or None if it is no text: see the module's docstring."""
    if field in ROLES and not isinstance(value, str):
        value = _last_message(value, ROLES[field])
    if field in NUMBERS and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if isinstance(value, int):
            return str(value)
        number = Decimal(str(value))
        if number.is_finite():
            # With an exponent only where the digits would be a very long text.
            return format(number, "f") if abs(number.adjusted()) <= 100 else str(number)
    return value if isinstance(value, str) else None


def _last_message(value: Any, role: str) -> Any:
    """Returns the content of the role's last message, or None."""
    if isinstance(value, Mapping):  # some readers turn a list of mappings into a mapping of lists
        contents, roles = value.get("content"), value.get("role")
        if not (isinstance(contents, list) and isinstance(roles, list) and len(contents) == len(roles)):
            return None
        value = [{"role": r, "content": content} for r, content in zip(roles, contents, strict=True)]
    if not isinstance(value, list):
        return None
    texts = [turn.get("content") for turn in value if isinstance(turn, Mapping) and turn.get("role") == role]
    return texts[-1] if texts else None


def _short(text: str) -> str:
    """Cuts a text for a message."""
    return text if len(text) <= 200 else f"{text[:200]}..."

