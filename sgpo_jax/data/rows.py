"""Problems: reading them, checking them, splitting them, and putting them into batches.

A row is a dict of strings: `id`, `problem`, `answer` always; `solution` (the expert's response),
`strategy`, `source`, `level` where they exist. Other fields are left out.

A source is a string, several are joined with ";". Data sets take options after "?":

    problems.jsonl, problems.parquet               a file
    folder?files=train-*                           the .jsonl and .parquet files of a folder, or those of that name
    owner/name?split=train,name=main               a Hugging Face dataset, its split and configuration
    tfds:name?split=train,data_dir=folder          a TFDS dataset in array_record files; TensorFlow is not needed
    arithmetic:train,count=4096,seed=1             the embedded world (or eval, or pretraining)
    reasoning_gym:gcd,chain_sum,count=500,seed=1   generated text problems; split=eval for others

In a data set the fields may have other names and lie deeper: `problem=question`, `answer=reward_model.ground_truth`,
`problem=prompt.1.content` (a list's items count from 0, or from -1 backwards). Where a problem or a solution is a list
of messages, it is the last one of the user, or of the assistant. `schema=luffy` stands for the names of the LUFFY set
(see SCHEMAS); further options add to it. A number is accepted as id, answer or level, and written out exactly.
`solution=` (nothing) leaves an optional field unread.

A source whose first row has no `id` gets numbers for ids: FILE/LINE, or NAME/SPLIT/NUMBER for the hub and TFDS; so does
one with the option `id=` (nothing).
"""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from sgpo_jax.data import sources

REQUIRED = ("id", "problem", "answer")
OPTIONAL = ("solution", "strategy", "source", "level")
NUMBERS = ("id", "answer", "level")  # fields where a number is as good as its text
ROLES = {"problem": "user", "solution": "assistant"}
# Names of fields in well-known sets; fields of ours that they do not have may be absent.
SCHEMAS = {
    # Elliott/Openr1-Math-46k-8192. Of the prompt only the user's message counts, since prompts are made here; a null
    # target is a problem without solution. The target's leading "<think>\n" stays: whether the model has to write it
    # depends on its chat template, so the warm-up decides (tokenizer.continuation). Its data_source is always empty.
    "luffy": {
        "id": "extra_info.index",
        "problem": "prompt",
        "answer": "reward_model.ground_truth",
        "solution": "target",
    },
}
_ABSENT = object()


def load(source: str) -> list[dict]:
    """All rows of a source (see the module's text), in a fixed order.

    Raises:
        ValueError: an unknown source or option, or a wrong row: the message names file and line,
            field, value, and what is allowed.
    """
    return [row for rows in load_parts(source).values() for row in rows]


def load_parts(source: str) -> dict[str, list[dict]]:
    """`load`, each of the joined sources by itself."""
    parts: dict[str, list[dict]] = {}
    places: dict[str, str] = {}
    for part in map(str.strip, source.split(";")):
        rows = parts.setdefault(part, [])
        for place, row in _read(part):
            if row["id"] in places:
                raise ValueError(
                    f"{place}: field 'id' is {row['id']!r}, which {places[row['id']]} has too; "
                    "allowed: a different id for every problem ('id=' in a source's options numbers its rows)"
                )
            places[row["id"]] = place
            rows.append(row)
    return parts


def _read(source: str) -> Iterator[tuple[str, dict]]:
    """(place, checked row) for every row of one source."""
    options, rows = sources.read(source, ("schema", *REQUIRED, *OPTIONAL))
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
        found = {field: _find(raw, path) for field, path in paths.items() if path}
        if i == 0:
            names = ", ".join(raw)
            numbered = "id" not in options and found["id"] is _ABSENT or not paths["id"]
        if numbered:
            found["id"] = number
        unseen -= {field for field, value in found.items() if value is not _ABSENT}
        yield place, _checked(found, paths, place, raw)
    if i < 0:
        raise ValueError(f"source {source!r}: there are no rows in it; allowed: at least one")
    if names and unseen:
        wrong = ", ".join(f"{field}={paths[field]}" for field in sorted(unseen))
        raise ValueError(f"source {source!r}: no row has {wrong}; the first row has {names}")


def _find(value: Any, path: str) -> Any:
    """What lies at a dotted path: `_ABSENT` where a step leads nowhere, None from a null on."""
    if isinstance(value, Mapping) and path in value:  # also a name with dots in it
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


def _checked(found: Mapping[str, Any], paths: Mapping[str, str], place: str, raw: Mapping) -> dict:
    """The fields as strings; one that is null or absent is left out if it is optional."""
    checked = {}
    for field, value in found.items():
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
    """What `_text` accepts, in words."""
    allowed = "a non-empty string"
    if field in NUMBERS:
        allowed += " or a number"
    if field in ROLES:
        allowed += f", or messages with one of the {ROLES[field]}"
    return allowed


def _text(field: str, value: Any) -> str | None:
    """A field's value as text, or None if it cannot be: see the module's text for numbers and messages."""
    if field in ROLES and not isinstance(value, str):
        value = _last_message(value, ROLES[field])
    if field in NUMBERS and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if isinstance(value, int):
            return str(value)
        number = Decimal(str(value))
        if number.is_finite():
            # Without an exponent, unless that would be a very long text.
            return format(number, "f") if abs(number.adjusted()) <= 100 else str(number)
    return value if isinstance(value, str) else None


def _last_message(value: Any, role: str) -> Any:
    """The content of the role's last message, or None."""
    if isinstance(value, Mapping):  # some readers give a list of mappings as a mapping of lists
        contents, roles = value.get("content"), value.get("role")
        if not (isinstance(contents, list) and isinstance(roles, list) and len(contents) == len(roles)):
            return None
        value = [{"role": r, "content": content} for r, content in zip(roles, contents, strict=True)]
    if not isinstance(value, list):
        return None
    texts = [turn.get("content") for turn in value if isinstance(turn, Mapping) and turn.get("role") == role]
    return texts[-1] if texts else None


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."

