import gzip
import json
import subprocess
import sys
from collections import Counter

import pytest
from helpers.paths import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_jax import data, rewards
from sgpo_jax.data.rows import _text


def row(i=0, **fields):
    return {"id": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1), **fields}


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


# Reading


def test_jsonl_keeps_known_fields_in_order(tmp_path):
    first = row(0, solution="é \u2028 \\boxed{1}", strategy="add", source="s", level="easy", url="x", solutions=3)
    file = write(tmp_path / "a.jsonl", first, row(1, level=5, strategy=None))
    with file.open("a") as f:
        f.write("\n")  # an empty last line is not a row
    assert data.load(str(file)) == [
        {k: v for k, v in first.items() if k not in ("url", "solutions")} | {"extra": {"url": "x", "solutions": 3}},
        row(1, level="5"),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r":2: not valid JSON"),
        (b"\xff\xfe{}".decode("latin-1").encode("latin-1"), r":2: not valid JSON"),
        ("[" * 100_000, r":2: not valid JSON"),
        ("[1]", r":2: a list; allowed: a JSON object"),
        ({"problem": "p", "answer": "1"}, r":2: field 'id' is missing; the row has problem, answer"),
        ({"id": "x", "answer": "1"}, r":2: field 'problem' is missing; the row has id, answer"),
        ({"id": "x", "problem": "p"}, r":2: field 'answer' is missing"),
        ({"id": "x", "problem": "p", "answer": True}, r":2: field 'answer' is True; allowed: a non-empty string or"),
        ('{"id": "x", "problem": "p", "answer": NaN}', r":2: field 'answer' is nan"),
        ({"id": "x", "problem": 5, "answer": "1"}, r":2: field 'problem' is 5; allowed: .*messages with one of"),
        ({"id": "x", "problem": "p" * 9999, "answer": {}}, r":2: field 'answer' is {}"),
        ({"id": "x", "problem": ["p" * 9999], "answer": "1"}, r":2: field 'problem' is \['p{198}\.\.\.; allowed"),
        ({"id": "x", "problem": " ", "answer": "1"}, r":2: field 'problem' is ' '"),
        ({"id": None, "problem": "p", "answer": "1"}, r":2: field 'id' is None"),
        (row(5, strategy=""), r":2: field 'strategy' is ''"),
        (row(5, solution=["a"]), r":2: field 'solution' is \['a'\]"),
        (row(5, level=True), r":2: field 'level' is True"),
        (row(0), r":2: field 'id' is 'p0', which .*a.jsonl:1 has too"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, line, message):
    file = write(tmp_path / "a.jsonl", row(0))
    if isinstance(line, dict):
        line = json.dumps(line)
    with file.open("ab") as f:
        f.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ValueError, match=r"a\.jsonl" + message):
        data.load(str(file))


def test_parquet_and_folders(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'hub'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'hub'")
    table = pyarrow.Table.from_pylist([row(2, strategy="add"), row(3, strategy=None)])
    parquet.write_table(table, tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", row(0), row(1))
    (tmp_path / "notes.txt").write_text("not data")
    expected = [row(0), row(1), row(2, strategy="add"), row(3)]
    assert data.load(str(tmp_path)) == expected
    assert data.load(f"{tmp_path / 'b.parquet'}; {tmp_path / 'a.jsonl'}") == expected[2:] + expected[:2]
    parquet.write_table(pyarrow.Table.from_pylist([row(7), row(0)]), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet:2: field 'id' is 'p0', which .*a\.jsonl:1 has too"):
        data.load(str(tmp_path))


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", row(0))
    assert data.load("~/a.jsonl") == data.load("~?files=a*") == [row(0)]


ROW = '{"id": "1", "problem": "What is 2 + 3?", "answer": "5"}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.ndjson", ROW.encode()),
        ("set.JSONL", ROW.encode()),
        ("set.jsonl.gz", ROW.encode()),
        ("set.ndjson.gz", b"\xef\xbb\xbf" + ROW.encode() + b"\r\n\n"),
        ("my set, v2.jsonl", ROW.encode()),
    ],
)
def test_lines_of_json_by_other_names_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert data.load(str(tmp_path / name)) == [json.loads(ROW)]
    number = name.removesuffix(".gz").rpartition(".")[0] + "/1"
    assert data.load(f"{tmp_path / name}?id=")[0]["id"] == number, "as of the file that is not packed"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("set.json", "is a .json file; allowed: a .jsonl or .parquet file"),
        ("data/set.csv", "is a .csv file; allowed: a .jsonl"),
        ("set.parquet.gz", "is a .gz file; allowed: a .jsonl"),
        ("set", "is a file without suffix; allowed: a .jsonl"),
    ],
)
def test_a_file_of_another_kind_is_no_data_set_of_the_hub(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(ROW)
    for source in (name, f"{name}?split=test", str(tmp_path / name)):
        with pytest.raises(ValueError) as error:
            data.load(source)
        assert said in str(error.value) and repr(source) in str(error.value)


def test_a_folder_without_data_says_what_it_has(tmp_path):
    for name in ("a.json", "b.csv", "c.json", "d"):
        (tmp_path / name).write_text(ROW)
    with pytest.raises(
        ValueError, match=r"no .jsonl or .parquet file named \*; its files are without suffix, .csv, .json$"
    ):
        data.load(str(tmp_path))


def test_a_broken_gzip_file_is_named(tmp_path):
    packed = gzip.compress("\n".join([ROW] * 5000).encode(), mtime=0)
    for content in (b"not packed", packed[:-20], packed[:50] + b"x" * 50 + packed[100:]):
        (tmp_path / "set.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"set.jsonl.gz: cannot be unpacked after line \d+ \("):
            data.load(f"{tmp_path / 'set.jsonl.gz'}?id=")


def test_missing_files_and_strange_sources(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        data.load(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"the folder has no .jsonl or .parquet file named \*"):
        data.load(str(tmp_path))
    for source in ("", "what is this", str(tmp_path / "absent"), "owner/sums:split=test"):
        with pytest.raises(ValueError, match="allowed: a .jsonl or .parquet file, a folder of them"):
            data.load(source)


def test_the_shared_problems_load():
    if not SHARED.is_dir():
        pytest.skip("shared/data is not there")
    names = ("gsm8k_train", "gsm8k_test", "math500", "amc23", "aime24", "olympiadbench")
    rows = data.load(";".join(str(SHARED / f"{name}.jsonl") for name in names))
    assert len(rows) == 7473 + 1319 + 500 + 40 + 30 + 675


def test_arithmetic_sources():
    train = data.load("arithmetic:train,count=70,seed=3")
    assert len(train) == 70 and train == data.load("arithmetic: train , seed=3,count=70")
    assert data.load("arithmetic:train,count=70") != train
    held_out = data.load("arithmetic:eval,count=70,seed=3")
    assert not {r["problem"] for r in train} & {r["problem"] for r in held_out}
    rows = data.load("arithmetic:pretraining,count=70,seed=3,preference=0.9,guided_share=1")
    assert len(rows) == 70 and all("strategy" in r for r in rows)
    assert len(data.load("arithmetic:train,count=64;arithmetic:eval,count=64")) == 128


@pytest.mark.parametrize(
    "source, message",
    [
        ("arithmetic", "exactly one of"),
        ("arithmetic:test,count=5", r"\['test'\]; allowed: exactly one of .*'train', 'eval', 'pretraining'"),
        ("arithmetic:train,eval,count=5", "exactly one of"),
        ("arithmetic:train", "count is None; allowed"),
        ("arithmetic:train,count=5,count=6", "option count is given twice"),
        ("arithmetic:train,count=5.0", "count is 5.0; allowed: an integer"),
        ("arithmetic:train,count=5,seed=one", "seed is 'one'; allowed: an integer"),
        ("arithmetic:train,count=5,preference=0.6", "option 'preference'; allowed: count, seed"),
        ("arithmetic:pretraining,count=5,prefrence=0.6", "stages, wording, families, pref"),
        ("arithmetic:pretraining,count=5,preference=high", "preference is 'high'; allowed"),
        ("reasoning_gym:count=5", "allowed: one or more different families"),
        ("reasoning_gym:gcd,gcd,count=5", "allowed: one or more different families"),
        ("reasoning_gym:gcd", "count is 0; allowed: at least 1"),
        ("reasoning_gym:gcd,chain_sum,count=1", "count is 1; allowed: at least 2"),
        ("reasoning_gym:gdc,count=1", "family is 'gdc'; allowed"),
    ],
)
def test_wrong_options(source, message):
    with pytest.raises(ValueError, match=message):
        data.load(source)


def test_reasoning_gym_sources():
    pytest.importorskip("reasoning_gym", reason="needs the extra 'gym'")
    rows = data.load("reasoning_gym:gcd,chain_sum,count=21,seed=1,split=eval;reasoning_gym:gcd,count=9,max_value=30")
    counts = Counter(r["source"] for r in rows)
    assert counts == {"reasoning_gym/gcd": 11 + 9, "reasoning_gym/chain_sum": 10}
    with pytest.raises(ValueError, match="allow_negation of chain_sum is 'maybe'; allowed: bool"):
        data.load("reasoning_gym:chain_sum,count=2,allow_negation=maybe")
    assert data.load("reasoning_gym:chain_sum,count=2,allow_negation=true")


def test_hugging_face_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")
    table = datasets.Dataset.from_list([{"question": f"{i}?", "answer": f"{i}", "extra": i} for i in range(3)])
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = data.load("owner/sums?split=test,name=main,problem=question")
    assert calls == [(("owner/sums", "main"), {"split": "test"})]
    assert [row.pop("extra") for row in rows] == [{"extra": i} for i in range(3)]
    assert rows == [{"id": f"owner/sums/test/{i}", "problem": f"{i}?", "answer": f"{i}"} for i in range(3)]
    assert data.load("sums?problem=question,id=answer")[2]["id"] == "2"
    with pytest.raises(ValueError, match="field 'problem' is missing"):
        data.load("owner/sums")
    with pytest.raises(ValueError, match=r"row 0: field 'problem' \(from 'task'\) is missing; the row has question, "):
        data.load("owner/sums?problem=task")
    with pytest.raises(ValueError, match="option 'spilt'; allowed: split, name, schema, id"):
        data.load("owner/sums?spilt=test")


HUB_FILES = {
    "more columns in a later file": {"a": [ROW], "b": ['{"id": "2", "problem": "q", "answer": "5", "level": "3"}']},
    "broken JSON": {"a": [ROW, '{"id": "2", "problem": ']},
    "a column that is null in the first file": {
        "a": [ROW[:-1] + ', "solution": null}'], "b": [ROW[:-1] + ', "solution": "2 + 3 = 5"}'],
    },
    "an empty file": {"a": [""]},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_that_do_not_fit_together_are_told_in_a_line(tmp_path, monkeypatch, name):
    """The hub is replaced by local files with the same defects, so the exceptions are those of the library."""
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")
    for file, lines in HUB_FILES[name].items():
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    real, files = datasets.load_dataset, sorted(map(str, tmp_path.glob("*.jsonl")))

    def load_dataset(name, config, split):
        return real("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError) as error:
        data.load("somebody/problems")
    message = str(error.value)
    assert message.startswith("source 'somebody/problems'") and "\n" not in message and len(message) < 900
    assert any(kind in message for kind in ("CastError", "ArrowInvalid", "TypeError", "ValueError", "ArrowTypeError"))


def test_a_value_of_the_hub_that_cannot_be_decoded_is_told(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")

    def table():
        yield json.loads(ROW)
        raise RuntimeError("no decoder\nfor images")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table())
    with pytest.raises(ValueError, match=r"cannot be read after row 0 \(RuntimeError: no decoder for images\)"):
        data.load("somebody/problems")


@pytest.mark.parametrize(
    "package, source, error",
    [
        ("datasets", "owner/name", "extra 'hub'"),
        ("pyarrow.parquet", "x.parquet", "extra 'hub'"),
        ("reasoning_gym", "reasoning_gym:gcd,count=1", "extra 'gym'"),
        ("tensorflow_datasets", "tfds:gsm8k", "extra 'tfds'"),
    ],
)
def test_an_absent_package_is_named_by_its_extra(monkeypatch, tmp_path, package, source, error):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises((ImportError, ValueError), match=error):
        data.load(source)


# Other names, deeper fields, messages, numbers


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


MESSAGES = turns(("system", "s"), ("user", "first"), ("assistant", "a1"), ("user", "last"), ("assistant", "a2"))


def write_parquet(path, *rows):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'hub'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'hub'")
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_fields_by_other_names_and_in_depth(tmp_path, suffix):
    raw = {
        "uid": 7, "chat": MESSAGES, "task": {"final": {"value": 42}, "hints": ["no", "yes"]}, "task.grade": "hard",
        "id": 3, "problem": 1, "solution": "not this",
    }  # fmt: skip
    folder = tmp_path / "a:b=c"
    folder.mkdir()
    (write_parquet if suffix == ".parquet" else write)(folder / f"set{suffix or '.jsonl'}", raw)
    path = folder / f"set{suffix}" if suffix else folder
    options = "problem=chat,solution=chat,answer=task.final.value,id=uid,strategy=task.hints.-1,level=task.grade"
    expected = {"id": "7", "problem": "last", "answer": "42", "solution": "a2", "strategy": "yes", "level": "hard"}
    expected["extra"] = {"id": 3, "problem": 1, "solution": "not this"}
    assert data.load(f"{path}?{options}") == [expected]
    del expected["solution"]
    changed = options.replace("problem=chat,solution=chat", " problem = chat.1.content , solution =")
    assert data.load(f"{path}?{changed}") == [{**expected, "problem": "first"}]


@pytest.mark.parametrize(
    "options, message",
    [
        ("problem=qestion", r"a\.jsonl:1: field 'problem' \(from 'qestion'\) is missing; the row has question, meta"),
        ("problem=question,answer=meta.2", r"field 'answer' \(from 'meta.2'\) is missing"),
        ("problem=question,answer=meta.-3", r"field 'answer' \(from 'meta.-3'\) is missing"),
        ("problem=question,answer=meta", r"field 'answer' \(from 'meta'\) is \['x', None\]; allowed: a non-empty"),
        ("problem=question,answer=meta.1", r"field 'answer' \(from 'meta.1'\) is None"),
        ("problem=question,answer=meta.1.x", r"field 'answer' \(from 'meta.1.x'\) is None"),
        ("problem=question,answer=meta.0,solution=soluton", r"no row has solution=soluton; the first row has question"),
        ("problem=question,answer=", "option answer is empty; allowed: the name of a field"),
        ("problem=question,answer=meta.0,answer=meta.0", "option answer is given twice"),
        ("question", "'question'; allowed: options such as"),
        ("question=problem", "option 'question'; allowed: schema, id, problem, answer, solution"),
        ("schema=lufy", "schema is 'lufy'; allowed: luffy"),
    ],
)
def test_a_wrong_mapping_is_named(tmp_path, options, message):
    file = write(tmp_path / "a.jsonl", {"question": "q", "meta": ["x", None]})
    with pytest.raises(ValueError, match=message):
        data.load(f"{file}?{options}")


def test_an_optional_field_may_be_absent_in_some_rows(tmp_path):
    file = write(tmp_path / "a.jsonl", row(0), row(1, hint={"text": "h"}), row(2, hint=None))
    assert [r.get("strategy") for r in data.load(f"{file}?strategy=hint.text")] == [None, "h", None]


@pytest.mark.parametrize(
    "messages, message",
    [
        (turns(("system", "s")), "field 'problem' is"),
        (turns(("user", "p"), ("user", 5)), "field 'problem' is"),
        ({"role": ["user"], "content": ["a", "b"]}, "field 'problem' is"),
        ([], "field 'problem' is"),
    ],
)
def test_messages_without_the_role_are_refused(tmp_path, messages, message):
    file = write(tmp_path / "a.jsonl", {"id": "a", "problem": messages, "answer": "1"})
    with pytest.raises(ValueError, match=message):
        data.load(str(file))


def test_messages_may_be_a_mapping_of_lists(tmp_path):
    columns = {name: [turn[name] for turn in MESSAGES] for name in ("role", "content")}
    file = write(tmp_path / "a.jsonl", {"id": "a", "problem": columns, "answer": "1", "solution": columns})
    assert data.load(str(file)) == [{"id": "a", "problem": "last", "answer": "1", "solution": "a2"}]


@pytest.mark.parametrize(
    "written, text",
    [
        ("42", "42"),
        ("-0", "0"),
        ("27.0", "27.0"),
        ("0.10", "0.10"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1e3", "1000"),
        ("2.5E-7", "0.00000025"),
        ("1e999999999", "1E+999999999"),
    ],
)
def test_numbers_are_written_out_exactly(tmp_path, written, text):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"id": 3, "problem": "p", "answer": {written}}}')
    assert data.load(str(file)) == [{"id": "3", "problem": "p", "answer": text}]


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1))
def test_a_number_of_a_parquet_file_keeps_its_value(number):
    text = _text("answer", number)
    assert type(number)(text) == number


def test_a_written_out_number_is_graded_as_the_number():
    verdicts = rewards.score([r"\boxed{27}", r"\boxed{0.1}", r"\boxed{26}"], ["27.0", "0.10", "27.0"])
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.0]


def test_rows_without_ids_are_numbered_by_file_and_line(tmp_path):
    def lines(count):
        return [{"problem": f"{i}?", "answer": i} for i in range(count)]

    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "b.jsonl", *lines(2))
        write_parquet(tmp_path / name / "a.parquet", *lines(3))
    expected = ["a/1", "a/2", "a/3", "b/1", "b/2"]
    assert [r["id"] for r in data.load(str(tmp_path / "here"))] == expected
    assert [r["id"] for r in data.load(str(tmp_path / "there"))] == expected
    assert [r["id"] for r in data.load(f"{tmp_path / 'here'}?files=b*")] == expected[3:]
    same = write(tmp_path / "same.jsonl", row(0), row(0))
    with pytest.raises(ValueError, match="field 'id' is 'p0'.*'id=' in a source's options"):
        data.load(str(same))
    assert [r["id"] for r in data.load(f"{same}?id=")] == ["same/1", "same/2"]
    with pytest.raises(ValueError, match=r"here: *|no .jsonl or .parquet file named c\*"):
        data.load(f"{tmp_path / 'here'}?files=c*")


def luffy(i, target="<think>\nFirst.\n</think>\n\\boxed{1}"):
    return {
        "data_source": "",
        "prompt": turns(("system", "Your task is"), ("user", f"{i}?")),
        "target": target and turns(("assistant", target)),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"split": "default", "index": i},
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_the_luffy_schema(tmp_path, kind, monkeypatch):
    raw = [luffy(0), luffy(1, target=None), luffy(2, target="No thought.")]
    if kind == "hub":
        datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(raw))
        source = "Elliott/Openr1-Math-46k-8192"
    else:
        source = (write_parquet if kind == "parquet" else write)(tmp_path / f"train.{kind}", *raw)
    rows = data.load(f"{source}?schema=luffy")
    assert [row.pop("extra") for row in rows] == [{"data_source": "", "ability": "math"}] * 3
    assert rows == [
        {"id": "0", "problem": "0?", "answer": "0", "solution": "<think>\nFirst.\n</think>\n\\boxed{1}"},
        {"id": "1", "problem": "1?", "answer": "1"},
        {"id": "2", "problem": "2?", "answer": "2", "solution": "No thought."},
    ]
    numbered = data.load(f"{source}?schema=luffy,id=,solution=,level=ability")
    assert [r.get("solution") for r in numbered] == [None] * 3 and numbered[0]["level"] == "math"
    without_targets = [{name: value for name, value in luffy(5).items() if name != "target"}]
    assert "solution" not in data.load(f"{write(tmp_path / 'valid.jsonl', *without_targets)}?schema=luffy")[0]


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow.parquet", reason="needs the extra 'hub'")
    whole = write_parquet(tmp_path / "whole.parquet", row(0)).read_bytes()
    for content in (b"", b"PAR1 no", whole[: len(whole) // 2]):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="x.parquet: cannot be read as parquet"):
            data.load(str(tmp_path / "x.parquet"))


PREPARE_TFDS = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class TinySums(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
        features = {"question": tfds.features.Text(), "target": np.int64, "raw": np.bytes_, "turns": turns,
                    "rates": tfds.features.Sequence(np.float32), "hints": tfds.features.Sequence(np.str_),
                    "meta": {"level": np.int32}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, download):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}
    def _generate_examples(self, count):
        for i in range(count):
            turns = [{"role": "user", "content": f"{i} + \u00e9?"}, {"role": "assistant", "content": f"s{i}"}]
            yield i, {"question": f"{i} + 1?", "target": i + 1, "rates": [i + 0.1], "raw": b"\\xff",
                      "meta": {"level": i}, "turns": turns, "hints": ["a", f"h{i}"]}

TinySums(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
READ_TFDS = """
import json, sys
from sgpo_jax import data
for source in sys.argv[1:]:
    try:
        print(json.dumps(data.load(source)))
    except ValueError as error:
        print(json.dumps(str(error)))
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
    """A data set is really prepared and read back, in fresh processes, where TensorFlow must not be imported."""
    pytest.importorskip("tensorflow_datasets", reason="needs the extra 'tfds'")

    def python(program, *arguments):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        root = ROOT
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    python(PREPARE_TFDS, tmp_path)
    names = "problem=turns,solution=turns,answer=target,level=meta.level,strategy=hints.1,source=question"
    refused = {
        f"tfds:tiny_sums?split=valid,data_dir={tmp_path}": "TFDS cannot load it (Unknown split 'valid'",
        f"tfds:huge_sums?data_dir={tmp_path}": "TFDS cannot load it (Dataset huge_sums not found.)",
        f"tfds:tiny_sums?data_dir={tmp_path}": "row 0: field 'problem' is missing; the row has hints, ",
        f"tfds:tiny_sums?data_dir={tmp_path},problem=raw,answer=rates.0": r"field 'problem' (from 'raw') is b'\xff'",
        "tfds:tiny_sums?spilt=train": "option 'spilt'; allowed: split, data_dir, schema",
    }
    whole, sliced, *errors = map(
        json.loads,
        python(
            READ_TFDS,
            f"tfds:tiny_sums?split=train,data_dir={tmp_path},{names}",
            f"tfds:tiny_sums:1.0.0?split=test[:1],data_dir={tmp_path},problem=question,answer=rates.0",
            *refused,
        ),
    )
    assert [r["id"] for r in whole] == [f"tiny_sums/train/{i}" for i in range(5)]
    assert all("raw" not in r.pop("extra", {}) for r in whole), "bytes are no JSON"
    by_level = {r.pop("level"): r for r in whole}
    expected = {"problem": "3 + \u00e9?", "answer": "4", "solution": "s3", "strategy": "h3", "source": "3 + 1?"}
    assert by_level["3"] == {"id": by_level["3"]["id"], **expected} and len(by_level) == 5
    assert (sliced[0]["problem"], sliced[0]["answer"]) in [("0 + 1?", "0.1"), ("1 + 1?", "1.1")] and len(sliced) == 1
    for message, error in zip(refused.values(), errors, strict=True):
        assert message in error


# Splitting


def test_splits_depend_on_the_id_alone():
    rows = [row(i) for i in range(3000)]
    for split, share in ((data.split_sft, 1 / 3), (data.split_sft, 0.8)):
        first, second = split(rows, share)
        assert sorted([r["id"] for r in first + second]) == sorted(r["id"] for r in rows)
        assert len(first) / 3000 == pytest.approx(share, abs=0.03)
        assert split(rows[::-2], share)[0] == [r for r in rows[::-2] if r in first]
    training, held_out = data.split_validation(rows)
    assert len(held_out) / 3000 == pytest.approx(0.1, abs=0.02) and len(training) + len(held_out) == 3000
    # The two splits are independent of each other: a tenth of the warm-up rows is held out too.
    first, _ = data.split_sft(rows, 0.2)
    assert len(data.split_validation(first)[1]) / len(first) == pytest.approx(0.1, abs=0.05)
    assert data.split_sft(rows, 0) == ([], rows) and data.split_sft(rows, 1) == (rows, [])
    with pytest.raises(ValueError, match="share is 1.5; allowed"):
        data.split_sft(rows, 1.5)


def test_splits_are_pinned():
    """Splits are the same on every machine and in every version, whatever PYTHONHASHSEED is."""
    rows = [row(i) for i in range(12)]
    assert [r["id"] for r in data.split_sft(rows)[0]] == ["p2", "p4", "p11"]
    assert [r["id"] for r in data.split_validation(rows, 0.3)[1]] == ["p2", "p8", "p9", "p11"]


# Batches


def test_every_epoch_is_a_new_order_of_the_same_rows():
    rows = [row(i) for i in range(10)]
    assert data.steps_per_epoch(rows, 3) == 3
    batches = data.batches(rows, 3, seed=1)
    epochs = [[r["id"] for step in range(3 * e, 3 * e + 3) for r in batches[step]] for e in range(4)]
    for epoch in epochs:
        assert len(set(epoch)) == 9
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert {i for epoch in epochs for i in epoch} == {r["id"] for r in rows}  # not always the same one is left out
    assert all(r in rows for r in batches[0])


def test_a_step_is_a_function_of_seed_and_step():
    rows = [row(i) for i in range(50)]
    first, again, other = (data.batches(rows, 8, seed) for seed in (1, 1, 2))
    in_order = [first[step] for step in range(20)]
    assert [again[step] for step in reversed(range(20))] == in_order[::-1]
    assert [other[step] for step in range(20)] != in_order
    assert first[100_000] == again[100_000]


@settings(max_examples=20)
@given(st.integers(1, 30), st.data())
def test_resuming_at_any_step_gives_the_batches_of_the_whole_run(count, draw):
    """A checkpoint stores only the step: a new sequence, entered at any step, continues like the first one."""
    rows = [row(i) for i in range(count)]
    size, seed = draw.draw(st.integers(1, count)), draw.draw(st.integers(0, 2**32 - 1))
    begun = data.batches(rows, size, seed)
    whole = [[r["id"] for r in begun[step]] for step in range(8)]
    first = draw.draw(st.integers(0, 7))
    resumed = data.batches([dict(r) for r in rows], size, seed)
    assert [[r["id"] for r in resumed[step]] for step in range(first, 8)] == whole[first:]


def test_batches_are_the_same_in_another_process():
    program = (
        "from sgpo_jax import data; rows = [{'id': str(i)} for i in range(50)]; "
        "print([r['id'] for r in data.batches(rows, 8, 5)[77]])"
    )
    rows = [{"id": str(i)} for i in range(50)]
    root = ROOT
    output = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == str([r["id"] for r in data.batches(rows, 8, 5)[77]])


def test_wrong_batches():
    rows = [row(i) for i in range(5)]
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"batch_size is {size}; allowed: from 1 to the number of rows, 5"):
            data.batches(rows, size, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        data.batches(rows, 2, -1)
    assert len(data.batches(rows, 5, 0)[3]) == 5


def test_other_fields_are_extra_and_the_first_rows_can_be_taken(tmp_path):
    line = {"question": "q", "answer": 1, "unit": "km", "weight": 0.5, "tags": ["a", None]}
    lines = [{"id": i, **line} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = data.load(f"{tmp_path}/a.jsonl?problem=question,first=2")
    assert [row["id"] for row in rows] == ["0", "1"]
    assert rows[0]["extra"] == {"unit": "km", "weight": 0.5, "tags": ["a", None]}
    assert json.loads(json.dumps(rows)) == rows, "a worker gets it as JSON"
    # Rows that were written with their extra fields are read back as they were.
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data.load(f"{tmp_path}/b.jsonl") == rows
    for wrong in ("0", "-1", "x", "1.5", ""):
        with pytest.raises(ValueError, match=f"first is '{wrong}'; allowed: a whole number from 1"):
            data.load(f"{tmp_path}/a.jsonl?problem=question,first={wrong}")


def test_extra_fields_do_not_change_which_rows_a_run_began_with(tmp_path):
    row = {"id": "a", "problem": "q", "answer": "1"}
    alone, more = (data.Sieve({"s": [row | extra]}).fingerprint() for extra in ({}, {"extra": {"unit": "km"}}))
    assert alone == more != data.Sieve({"s": [row | {"level": "2"}]}).fingerprint()
