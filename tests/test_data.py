import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sgpo_jax import data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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
        {k: v for k, v in first.items() if k not in ("url", "solutions")},
        row(1, level="5"),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r":2: not valid JSON"),
        (b"\xff\xfe{}".decode("latin-1").encode("latin-1"), r":2: not valid JSON"),
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
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
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
        ("arithmetic:train,count=5,count=6", "option count is there twice"),
        ("arithmetic:train,count=5.0", "count is 5.0; allowed: an integer"),
        ("arithmetic:train,count=5,seed=one", "seed is 'one'; allowed: an integer"),
        ("arithmetic:train,count=5,preference=0.6", "option 'preference'; allowed: count, seed"),
        ("arithmetic:pretraining,count=5,prefrence=0.6", "allowed: count, seed, preference, guided_share"),
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
    pytest.importorskip("reasoning_gym")
    rows = data.load("reasoning_gym:gcd,chain_sum,count=21,seed=1,split=eval;reasoning_gym:gcd,count=9,max_value=30")
    counts = Counter(r["source"] for r in rows)
    assert counts == {"reasoning_gym/gcd": 11 + 9, "reasoning_gym/chain_sum": 10}
    with pytest.raises(ValueError, match="allow_negation of chain_sum is 'maybe'; allowed: bool"):
        data.load("reasoning_gym:chain_sum,count=2,allow_negation=maybe")
    assert data.load("reasoning_gym:chain_sum,count=2,allow_negation=true")


def test_hugging_face_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"question": f"{i}?", "answer": f"{i}", "extra": i} for i in range(3)])
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = data.load("owner/sums?split=test,name=main,problem=question")
    assert calls == [(("owner/sums", "main"), {"split": "test"})]
    assert rows == [{"id": f"owner/sums/test/{i}", "problem": f"{i}?", "answer": f"{i}"} for i in range(3)]
    assert data.load("sums?problem=question,id=answer")[2]["id"] == "2"
    with pytest.raises(ValueError, match="field 'problem' is missing"):
        data.load("owner/sums")
    with pytest.raises(ValueError, match=r"row 0: field 'problem' \(from 'task'\) is missing; the row has question, "):
        data.load("owner/sums?problem=task")
    with pytest.raises(ValueError, match="option 'spilt'; allowed: split, name, schema, id"):
        data.load("owner/sums?spilt=test")


@pytest.mark.parametrize(
    "package, source, error",
    [
        ("datasets", "owner/name", "extra 'hub'"),
        ("pyarrow.parquet", "x.parquet", "extra 'hub'"),
        ("reasoning_gym", "reasoning_gym:gcd,count=1", "extra 'gym'"),
    ],
)
def test_an_absent_package_is_named_by_its_extra(monkeypatch, tmp_path, package, source, error):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises((ImportError, ValueError), match=error):
        data.load(source)


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
    """The same rows on every machine and in every version, whatever PYTHONHASHSEED is."""
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


def test_batches_are_the_same_in_another_process():
    program = (
        "from sgpo_jax import data; rows = [{'id': str(i)} for i in range(50)]; "
        "print([r['id'] for r in data.batches(rows, 8, 5)[77]])"
    )
    rows = [{"id": str(i)} for i in range(50)]
    root = Path(__file__).resolve().parents[1]
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
