"""Mistakes of a user: each is refused in one message with the place, the value and what is allowed.

A case is a name, an action, and what the message must match. The cases add to those of the modules' own tests
(test_config, test_data, test_huggingface, test_models_config, test_gguf, test_tokenizer, test_strategies).
"""

import gzip
import json
import math
import resource
import runpy
import shutil
import struct
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gguf_files
from helpers.paths import ROOT
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from sgpo_jax import cli, config_checks, data, models, policy, sharding
from sgpo_jax import config as configs
from sgpo_jax.commands import export
from sgpo_jax.models import gguf, huggingface
from sgpo_jax.policy import tokenizer
from sgpo_jax.runtime import journal
from sgpo_jax.training import stage

TINY = {"model.layers": 1, "model.hidden": 16, "model.heads": 2, "model.mlp": 16}


def config_of(**changes) -> ConfigDict:
    """Returns the quickstart's config with fields set to any value of any type; `...` removes a field."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.lab.methods = ("sgpo", "grpo")
    config.extract.source = "problems"
    with config.unlocked(), config.ignore_type():
        for field, value in changes.items():
            *path, last = field.split(".")
            node = config
            for name in path:
                node = node[name]
            if value is ...:
                del node[last]
            else:
                node[last] = value
    return config.lock()


# ---- configs


def check_with(check, changes, place):
    check(config_of(**changes))


CONFIGS = {
    "None for a whole number": ({"rl.batch": None}, r"config\.rl\.batch=None: must be a whole number"),
    "None for a number": ({"rl.delta": None}, r"config\.rl\.delta=None: must be a number"),
    "None for text": ({"data.train": None}, r"config\.data\.train=None: must be text"),
    "None for a section": ({"mesh": None}, r"config\.mesh=None: must be a section"),
    "a bool for a whole number": ({"seed": True}, r"config\.seed=True: must be a whole number"),
    "text for a whole number": ({"sft.batch": "64"}, r"config\.sft\.batch='64': must be a whole number"),
    "half a response": ({"rl.guided": 2.5}, r"config\.rl\.guided=2\.5: must be a whole number"),
    "a seed that is NaN": ({"seed": math.nan}, r"config\.seed=nan: must be a whole number"),
    "a number for text": ({"model.source": 5}, r"config\.model\.source=5: must be text"),
    "a number for a switch": ({"eval.guided": 1}, r"config\.eval\.guided=1: must be True or False"),
    "text for stages": ({"stages": "sft"}, r"config\.stages='sft': must be a tuple"),
    "a number among stages": ({"stages": (5,)}, r"config\.stages=\(5,\): must be one or more of \('sft', 'rl',"),
    "a field that is missing": ({"rl.delta": ...}, r"config\.rl\.delta: is missing"),
    "a section that is missing": ({"optimizer": ...}, r"config\.optimizer: is missing"),
    "a field that is none": ({"optimizer.momentum": 0.9}, r"config\.optimizer\.momentum: is not a field; allowed: b1,"),
    "a value for the sets": ({"eval.sets": "math500"}, r"config\.eval\.sets='math500': must be a section"),
    "two sizes to fill in": (
        {"mesh.data": -1, "mesh.fsdp": -1},
        r"config\.mesh\.data=-1: must be at least 1 when mesh\.fsdp is -1",
    ),
    "three sizes to fill in": (
        {"mesh.data": -1, "mesh.tensor": -1},
        r"config\.mesh\.data=-1: must be at least 1 when mesh\.fsdp and mesh\.tensor is -1",
    ),
    "more steps than a number holds": ({"rl.steps": 2**31}, r"config\.rl\.steps=2147483648: must be at most 21474"),
    "a batch without end": ({"sft.batch": 10**30}, r"config\.sft\.batch=10{30}: must be at most"),
    "samples without end": (
        {"eval.sets.heldout.samples": 2**40}, r"config\.eval\.sets\.heldout\.samples=1099511627776: must be a whole",
    ),
    "True samples": ({"eval.sets.heldout.samples": True}, r"config\.eval\.sets\.heldout\.samples=True: must be a"),
    "a set whose name is a path": (
        {"eval.sets": ConfigDict({"a/b": {"source": "s", "samples": 1}})},
        r"config\.eval\.sets\.a/b: must have a name of letters, digits, '_' and '-'",
    ),
    "a name no file can have": ({"data.train": f"/{'a' * 300}"}, r"config\.data\.train='/aaa.*no such file"),
    "a name with NUL": ({"data.train": "./a\0b"}, r"config\.data\.train='\./a\\x00b': there is no such file"),
    "a user who is none": ({"sft.train": "~nosuchuser/a"}, r"config\.sft\.train='~nosuchuser/a': there is no such"),
}  # fmt: skip
EXTRACTIONS = {
    "a model that is none": ({"extract.judge": None}, r"config\.extract\.judge=None: must be a section"),
    "an engine that is none": ({"extract.judge.engine": None}, r"config\.extract\.judge\.engine=None: must be text"),
    "a budget in words": ({"extract.budget_cost": "20"}, r"config\.extract\.budget_cost='20': must be a number"),
    "half a try": ({"extract.retries": 1.5}, r"config\.extract\.retries=1\.5: must be a whole number"),
}
LABS = {
    "no method": ({"lab.methods": ()}, r"config\.lab\.methods=\(\): must be one or more of sgpo, sft, grpo"),
    "an unknown method": ({"lab.methods": ("grop",)}, r"config\.lab\.methods=\('grop',\): must be one or more of sgpo"),
    "methods in a list": ({"lab.methods": (["sgpo"],)}, r"config\.lab\.methods=\(\['sgpo'\],\): must be one or more"),
    "half a seed": ({"lab.seeds": (0.5,)}, r"config\.lab\.seeds=\(0\.5,\): must be different seeds"),
    "a seed twice": ({"lab.seeds": (1, 1)}, r"config\.lab\.seeds=\(1, 1\): must be different seeds"),
    "seeds of the tuning": ({"lab.seeds": (100,)}, r"config\.lab\.tuning_seeds=\(100,\): must be different from lab"),
    "rates in words": ({"lab.rates": ("1",)}, r"config\.lab\.rates=\('1',\): must be different numbers above 0"),
    "rates that are NaN": ({"lab.rates": (math.nan,)}, r"config\.lab\.rates=\(nan,\): must be different numbers above"),
    "an unknown world": ({"lab.worlds": ("mars",)}, r"config\.lab\.worlds=\('mars',\): must be .* of \['base'\]"),
}

# ---- rows and sources

ROW = {"id": "a", "problem": "p", "answer": "1"}


def written(**fields) -> bytes:
    return json.dumps(ROW | fields).encode()


def load_rows(content, place):
    (place / "a.jsonl").write_bytes(content)
    data.load(str(place / "a.jsonl"))


ROWS = {
    "an exponent beyond reason": (b'{"id": "a", "answer": 1e99999999999999999999}', r"a\.jsonl:1: not valid JSON"),
    "a number of 5000 digits": (b'{"id": "a", "answer": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: not valid JSON"),
    "half a character in a problem": (
        written(problem="a\ud800b"), r"a\.jsonl:1: field 'problem' is 'a\\ud800b'; allowed: .*without half characters",
    ),
    "half a character in an id": (written(id="\udfff"), r"a\.jsonl:1: field 'id' is '\\udfff'; allowed"),
    "half a character in a message": (
        written(solution=[{"role": "assistant", "content": "\ud834"}]), r"a\.jsonl:1: field 'solution' is '\\ud834'",
    ),
    "UTF-16": (json.dumps(ROW).encode("utf-16"), r"a\.jsonl:1: not valid JSON in UTF-8"),
    "Latin-1": (json.dumps(ROW | {"problem": "\xe9"}, ensure_ascii=False).encode("latin-1"), r"not valid JSON in"),
    "NUL bytes": (written() + b"\n" + bytes(100), r"a\.jsonl:2: not valid JSON"),
    "a compressed file": (gzip.compress(written(), mtime=0), r"a\.jsonl:1: not valid JSON"),
    "a table": (b"id,problem,answer\na,p,1\n", r"a\.jsonl:1: not valid JSON"),
    "one JSON array": (json.dumps([ROW]).encode(), r"a\.jsonl:1: a list; allowed: a JSON object"),
    "JSON over several lines": (json.dumps(ROW, indent=1).encode(), r"a\.jsonl:1: not valid JSON"),
    "a null row": (written() + b"\nnull", r"a\.jsonl:2: a NoneType; allowed: a JSON object"),
    "an empty file": (b"", r"a\.jsonl': there are no rows in it; allowed: at least one"),
    "empty lines only": (b"\n \n\n", r"a\.jsonl': there are no rows in it"),
    "a huge broken line": (b'{"id": "' + b"x" * 5_000_000, r"a\.jsonl:1: not valid JSON in UTF-8 \(Unterminated"),
    "a huge wrong field": (written(answer=["x" * 5_000_000]), r"a\.jsonl:1: field 'answer' is \['x+\.\.\.; allowed: "),
    "a deep problem": (
        written()[:-1] + b', "problem": ' + b"[" * 500 + b"]" * 500 + b"}", r"field 'problem' is \[+\.\.\.; allowed",
    ),
}  # fmt: skip


def load_source(source, place):
    (place / "folder.jsonl").mkdir()
    (place / "a.jsonl").write_bytes(written())
    (place / "b.jsonl").write_bytes(written())
    data.load(source.format(place=place))


SOURCES = {
    "a folder without files": ("{place}/folder.jsonl", r"folder\.jsonl': the folder has no \.jsonl or \.parquet file"),
    "an id in two files": ("{place}/a.jsonl;{place}/b.jsonl", r"b\.jsonl:1: field 'id' is 'a', which .*a\.jsonl:1 has"),
    "a file twice": ("{place}/a.jsonl; {place}/a.jsonl", r"field 'id' is 'a', which .*a\.jsonl:1 has too"),
    "a name no file can have": (f"/{'a' * 300}.jsonl", r"there is no such file"),
    "a name with NUL": ("~\0/a.jsonl", r"source '~\\x00/a\.jsonl': .* NUL"),
    "a user who is none": ("~nosuchuser/a.jsonl", r"source '~nosuchuser/a\.jsonl': there is no such file"),
    "files elsewhere": ("{place}?files=/etc/*", r"files=/etc/\* .*allowed: names in the folder"),
    "no name of files": ("{place}?files=", r"files= .*allowed: names in the folder"),
    "nothing after the semicolon": ("{place}/a.jsonl;", r"source ''; allowed: a \.jsonl or"),
}  # fmt: skip

# ---- folders of models


@pytest.fixture(scope="session")
def good_model(tmp_path_factory) -> Path:
    """Makes an undamaged Hugging Face folder of a tiny model of the embedded world."""
    tok = tokenizer.load("arithmetic")
    config = policy.scratch_config(len(tok), layers=1, hidden=16, heads=2, mlp=16)
    folder = tmp_path_factory.mktemp("good") / "model"
    huggingface.save(folder, models.init(jax.random.key(0), config), config, tokenizer=tok, stop_ids=[1])
    return folder


def load_model(folder):
    _, initial = policy.load(
        str(folder), "", layers=0, hidden=0, heads=0, mlp=0, dtype=jnp.float32, instruction=""
    )
    return initial(jax.random.key(0), sharding.make_mesh())


def load_changed(change, place):
    change(place / "model")
    load_model(place / "model")


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def fields(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


config, of_tokenizer = partial(fields, "config.json"), partial(fields, "tokenizer_config.json")


def without(*names, **instead):
    """Returns a change that removes files and writes others, whose names have "__" for a dot."""

    def change(folder):
        for name in names:
            (folder / name).unlink()
        for name, content in instead.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return change


def header(content: dict, lengthen: int = 0):
    """Returns a change that gives the weights another header."""
    encoded = json.dumps(content).encode()
    written = struct.pack("<Q", len(encoded) + lengthen) + encoded + bytes(64)
    return lambda folder: (folder / "model.safetensors").write_bytes(written)


def number(value):
    """Returns a change of one number of the weights."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        name = max(tensors, key=lambda name: tensors[name].size)
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] = value
        save_file(tensors, folder / "model.safetensors")

    return change


WEIGHTS = "model.safetensors"
MODELS = {
    "no config.json": (without("config.json"), r"config\.json cannot be read as JSON"),
    "a list for config.json": (text("config.json", "[]"), r"config\.json must hold a JSON object, not a list"),
    "a deep config.json": (text("config.json", "[" * 100_000), r"config\.json cannot be read as JSON: .*recursion"),
    "Latin-1 in config.json": (lambda f: (f / "config.json").write_bytes(b'"\xff"'), r"config\.json cannot be read as"),
    "a billion layers": (config(num_hidden_layers=10**9), r"num_hidden_layers is 1000000000; it must be .* at most"),
    "a thousand layers": (config(num_hidden_layers=1000), r"num_hidden_layers is 1000; the checkpoint has 13 tensors"),
    "a vocabulary of 2**40": (config(vocab_size=2**40), r"vocab_size is 1099511627776; it must be .* at most 16777216"),
    "a vocabulary too small": (config(vocab_size=3), r"the tokenizer has 126 tokens, the model's vocabulary 3"),
    "a list of lists of architectures": (config(architectures=[["x"]]), r"architectures is \[\['x'\]\]; supported:"),
    "a list for model_type": (config(model_type=[]), r"model_type is \[\]; Qwen3ForCausalLM has 'qwen3'"),
    "a number for layer_types": (config(layer_types=5), r"layer_types is 5; it must be a list"),
    "a number for rope_scaling": (config(rope_scaling=5), r"rope_scaling is 5; it must be an object"),
    "text for head_dim": (config(head_dim="x"), r"head_dim is 'x'; it must be an integer"),
    "text for a switch": (config(tie_word_embeddings="yes"), r"tie_embeddings is 'yes'; allowed: True, False"),
    "no tokenizer": (without("tokenizer.json"), r"tokenizer '.*/model': not a Hugging Face folder or hub id that can"),
    "an empty tokenizer": (text("tokenizer.json", "{}"), r"tokenizer '.*/model': not a Hugging Face folder"),
    "a list for a tokenizer": (text("tokenizer.json", "[]"), r"tokenizer '.*/model': not a Hugging Face folder"),
    "a list for its config": (text("tokenizer_config.json", "[]"), r"tokenizer '.*/model': not a Hugging Face folder"),
    "a number for its class": (of_tokenizer(tokenizer_class=5), r"tokenizer '.*/model': not a Hugging Face folder"),
    "a number for a token": (of_tokenizer(eos_token=5), r"not a Hugging Face folder .*eos_token has to be"),
    "a number for its tokens": (of_tokenizer(added_tokens_decoder=5), r"tokenizer '.*/model': not a Hugging Face"),
    "a slow tokenizer": (of_tokenizer(tokenizer_class="ByT5Tokenizer"), r"is a ByT5Tokenizer; allowed: one with a"),
    "a length in words": (of_tokenizer(model_max_length="x"), r"tokenizer '.*/model': its chat template fails"),
    "a broken template": (text("chat_template.jinja", "{% for %}"), r"its chat template fails \(TemplateSyntaxError"),
    "a template that refuses": (text("chat_template.jinja", "{{ raise_exception('no') }}"), r"template fails .*: no\)"),
    "a template that breaks out": (
        text("chat_template.jinja", "{{ messages.__class__.__mro__ }}"), r"its chat template fails \(SecurityError",
    ),
    "a template that reads files": (
        text("chat_template.jinja", "{% include '/etc/hostname' %}"), r"its chat template fails",
    ),
    "a template without end": (
        text("chat_template.jinja", "{% for i in range(10 ** 9) %}x{% endfor %}"), r"fails \(OverflowError: Range too",
    ),
    "a template without messages": (text("chat_template.jinja", "Hello"), r"its chat template leaves out what the"),
    "no template": (without("chat_template.jinja"), r"has no chat template"),
    "a list for generation_config.json": (text("generation_config.json", "[]"), r"generation_config\.json must hold a"),
    "a broken generation_config.json": (text("generation_config.json", "{"), r"generation_config\.json cannot be read"),
    "text for a stop token": (
        text("generation_config.json", '{"eos_token_id": "x"}'), r"eos_token_id is \['x'\]; allowed: token ids",
    ),
    "lists of stop tokens": (
        text("generation_config.json", '{"eos_token_id": [[1]]}'), r"eos_token_id is \[\[1\]\]; allowed: token ids",
    ),
    "a negative stop token": (text("generation_config.json", '{"eos_token_id": -1}'), r"eos_token_id is \[-1\];"),
    "pickled weights of torch": (
        without(WEIGHTS, consolidated__pth=b"cos\nsystem\n"), r"pickles are never opened: consolidated\.pth",
    ),
    "pickled weights in parts": (
        without(WEIGHTS, model__pt=b"", pytorch_model__bin=b""), r"pickles are never opened: model\.pt,",
    ),
    "a pickle with another name": (
        without(WEIGHTS, model__safetensors=b"\x80\x04\x95" + bytes(50)), r"model\.safetensors cannot be read as safe",
    ),
    "a header longer than the file": (header({}, lengthen=2**40), r"model\.safetensors cannot be read as safetensors"),
    "a tensor outside of the file": (
        header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), r"cannot be read as safetensors",
    ),
    "tensors on top of each other": (
        header({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}), r"cannot be read as safet",
    ),
    "a folder for weights": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), r"cannot be read as"),
    "a broken index": (without(WEIGHTS, model__safetensors__index__json=b"{"), r"index\.json cannot be read as JSON"),
    "nothing at all": (lambda f: (shutil.rmtree(f), f.mkdir()), r"config\.json cannot be read as JSON"),
    "a file for a folder": (
        lambda f: (shutil.rmtree(f), f.write_text("x")), r"model '.*/model' is a file; allowed: a folder \(an archive",
    ),
    "a parameter that is NaN": (number(np.nan), r"model '.*/model': NaN or infinity in 1 of its parameters: [a-z]+/"),
    "a parameter that is infinite": (number(-np.inf), r"NaN or infinity in 1 of its parameters"),
}  # fmt: skip

# ---- GGUF


def write_gguf(path, **metadata):
    package = pytest.importorskip("gguf", reason="the smollm2 extra is not installed")
    writer = package.GGUFWriter(path, "llama")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
               "attention.head_count": 2}  # fmt: skip
    for name, value in (numbers | metadata).items():
        name = name if name.startswith("tokenizer.") else f"llama.{name}"
        (writer.add_array if isinstance(value, list) else writer.add_string if isinstance(value, str) else
         writer.add_uint32)(name, value)  # fmt: skip
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((40, 32), np.float32))
    gguf_files.close(writer)


def load_gguf(metadata, place):
    write_gguf(place / "m.gguf", **metadata)
    gguf.load(place / "m.gguf")


def load_gguf_tokenizer(changes, place):
    words = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"], "merges": ["a b"], "token_type": [1, 1]} | changes
    write_gguf(place / "m.gguf", **{f"tokenizer.ggml.{name}": value for name, value in words.items()})
    gguf.tokenizer(place / "m.gguf")


GGUFS = {
    "no heads": ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0; .*at least 1"),
    "heads in a list": ({"attention.head_count": [2, 2]}, r"llama\.attention\.head_count is \[2, 2\]; .*at least 1"),
    "a width in words": ({"embedding_length": "x"}, r"llama\.embedding_length is 'x'; .*at least 1"),
    "many layers": ({"block_count": 2**31}, r"num_layers is 2147483648; it must be .* at most 16777216"),
    "layers that are not there": ({"block_count": 99}, r"num_hidden_layers is 99; the checkpoint has 1 tensors"),
}
GGUF_TOKENIZERS = {
    "merges that are none": ({"merges": ["ab"]}, r"tokenizer\.ggml\.tokens and \.merges of .*m\.gguf do not make a"),
    "merges to no token": ({"tokens": ["a", "c"]}, r"tokenizer\.ggml\.tokens and \.merges of .*m\.gguf do not make a"),
    "types for other tokens": ({"token_type": [1]}, r"tokenizer\.ggml\.token_type of .*m\.gguf has 1 .* 2 tokens"),
}

# ---- checkpoints


@pytest.fixture(scope="session")
def good_run(tmp_path_factory) -> Path:
    """Makes the folder of a run with one checkpoint of its warm-up."""
    workdir = tmp_path_factory.mktemp("good") / "run"
    config = config_of(**TINY)
    chosen, load = stage.load_policy(config)
    tx, _ = stage.optimizer(config, "sft", 1)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with stage.checkpoints(config, workdir, "sft") as saved:
        saved.save(1, stage.start(saved, lambda: load(jax.random.key(0)), chosen, tx, mesh), 0.5)
    (workdir / "config.json").write_text(configs.to_json(config))
    return workdir


def resume(change, fields, place):
    run = place / "run"
    change(run)
    config = config_of(**(TINY | fields))
    configs.check_resume(config, run / "config.json")
    chosen, load = stage.load_policy(config)
    tx, _ = stage.optimizer(config, "sft", 1)
    with stage.checkpoints(config, run, "sft") as saved:
        stage.start(saved, lambda: load(jax.random.key(0)), chosen, tx, sharding.make_mesh(devices=jax.devices()[:1]))


def cut_arrays(run):
    for path in run.glob("sft/checkpoints/1/state/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


STEP = "sft/checkpoints/1"
CHECKPOINTS = {
    "another width": (lambda run: None, {"model.hidden": 32}, r"config\.model\.hidden=32: the run in .*run has 16"),
    "another model without a config": (
        lambda run: (run / "config.json").unlink(), {"model.mlp": 32}, r"checkpoints/1 has another model or",
    ),
    "a broken config": (text("config.json", "{"), {}, r"config\.json: is not the config of an earlier run"),
    "a list for a config": (text("config.json", "[]"), {}, r"config\.json: is not the config of an earlier run"),
    "no arrays": (lambda run: shutil.rmtree(run / STEP / "state"), {}, r"all checkpoints are damaged: .*1\.damaged"),
    "no seed": (lambda run: shutil.rmtree(run / STEP / "run"), {}, r"all checkpoints are damaged: .*1\.damaged"),
    "a broken seed": (text(f"{STEP}/run/metadata", "{"), {}, r"all checkpoints are damaged: .*1\.damaged"),
    "half of the arrays": (cut_arrays, {}, r"all checkpoints are damaged: .*1\.damaged"),
}  # fmt: skip


def export_nothing(place):
    export.run(config_of(**TINY, **{"mesh.data": 8}), place / "run", "rl", place / "out", "float32")


# ---- the environment


def too_many_devices(place):
    sharding.make_mesh(data=len(jax.devices()) + 1)


def split_heads(place):
    config = config_of(**TINY)
    stage.open_run(config, place, sharding.make_mesh(1, 2, 2, context=2))


def ask_for_folder(name, place):
    (place / "file").write_text("x")
    cli.folder("workdir", name.format(place=place))


FOLDERS = {
    "a file": ("{place}/file", r"^--workdir=.*/file: must be a folder that can be written to \(.*Not a directory"),
    "below a file": ("{place}/file/run", r"^--workdir=.*/file/run: must be a folder that can be written to \("),
    "below what is no folder": ("/proc/version/run", r"^--workdir=/proc/version/run: must be a folder that can be"),
    "where nobody may write": ("/proc/run", r"^--workdir=/proc/run: must be a folder that can be written to \("),
    "a user who is none": ("~nosuchuser/run", r"^--workdir=~nosuchuser/run: there is no such home folder"),
    "a bucket of the hub": (
        "hf://buckets/me/mine/run", r"^--workdir=hf://buckets/me/mine/run: must be hf://OWNER/NAME .* a bucket of the "
        r"hub is s3://mine/run with AWS_ENDPOINT_URL=https://s3\.hf\.co/me",
    ),
    "a space of the hub": ("hf://spaces/me/mine", r"^--workdir=hf://spaces/me/mine: must be hf://OWNER/NAME or hf://data"),
    "a revision": ("hf://me/mine@v1/run", r"^--workdir=hf://me/mine@v1/run: must be hf://OWNER/NAME or .*'me/mine@v1'"),
    "an owner alone": ("hf://me", r"^--workdir=hf://me: must be hf://OWNER/NAME or hf://datasets/OWNER/NAME, with an "),
}  # fmt: skip


def table(section, do, cases):
    """Returns {name: (action in a folder, message)}."""
    return {f"{section}: {name}": (partial(do, *what), message) for name, (*what, message) in cases.items()}


CASES = (
    table("config", partial(check_with, config_checks.check), CONFIGS)
    | table("extraction", partial(check_with, config_checks.check_extract), EXTRACTIONS)
    | table("lab", partial(check_with, config_checks.check_lab), LABS)
    | table("row", load_rows, ROWS)
    | table("source", load_source, SOURCES)
    | table("model", load_changed, MODELS)
    | table("gguf", load_gguf, GGUFS)
    | table("gguf tokenizer", load_gguf_tokenizer, GGUF_TOKENIZERS)
    | table("checkpoint", resume, CHECKPOINTS)
    | table("workdir", ask_for_folder, FOLDERS)
    | {
        "checkpoint: none": (export_nothing, r"workdir='.*run': there is no checkpoint of stage 'rl'"),
        "mesh: more than there are devices": (too_many_devices, r"mesh\.data=9, .* needs .* 9 devices; there are 8"),
        "mesh: more parts than heads": (
            split_heads,
            r"config\.mesh\.context=2: must divide, times mesh\.tensor=2, the model's 2 query heads",
        ),
    }
)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_message(name, tmp_path, request):
    do, message = CASES[name]
    for kind in ("model", "run"):
        if name.startswith({"model": "model:", "run": "checkpoint:"}[kind]):
            shutil.copytree(request.getfixturevalue(f"good_{kind}"), tmp_path / kind)
    with pytest.raises(ValueError, match=message) as error:
        do(tmp_path)
    assert len(str(error.value)) < 2000


def test_the_catalogue_is_large_and_what_it_damages_is_whole(good_model, good_run, tmp_path):
    assert len(CASES) >= 100
    load_model(good_model)
    shutil.copytree(good_run, tmp_path / "run")
    resume(lambda run: None, {}, tmp_path)
    for check in (config_checks.check, config_checks.check_extract, config_checks.check_lab):
        check(config_of())
    assert cli.folder("workdir", f"{tmp_path}/a/b") == tmp_path / "a/b" and not (tmp_path / "a").exists()
    load_gguf_tokenizer({"tokens": ["a", "b", "ab"], "token_type": [1, 1, 1]}, tmp_path)


# ---- code and links in a model's folder


def test_code_and_pickles_in_a_model_folder_are_never_run(good_model, tmp_path):
    """The folder names its own classes wherever transformers looks for them, and has pickles that write a file."""
    folder, marker = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(good_model, folder)
    evil = f"open({str(marker)!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "tokenizer.py", "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(evil)
    bomb = f"cbuiltins\nopen\n(S{str(marker)!r}\nS'w'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pkl", "tokenizer.pkl"):
        (folder / name).write_bytes(bomb)
    classes = ["AutoConfig", "AutoModelForCausalLM"]
    config(auto_map={name: "evil.Evil" for name in classes})(folder)
    of_tokenizer(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")(folder)
    load_model(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="pickles are never opened"):
        load_model(folder)
    assert not marker.exists() and not [name for name in sys.modules if "evil" in name.lower()]


def test_weights_of_another_model_are_refused_by_tensor(good_model, tmp_path):
    shutil.copytree(good_model, tmp_path / "model")
    file = tmp_path / "model" / WEIGHTS
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": np.zeros((16, 2), np.float32)}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(16, 2\); the config asks for \(16,\)"):
        load_model(tmp_path / "model")


# ---- a full disk


@contextmanager
def disk_of(size):
    """Makes the kernel refuse every write beyond `size` bytes of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_half_export(good_model, tmp_path):
    params, shape = huggingface.load(good_model)
    with disk_of(1000), pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*File too large"):
        huggingface.save(tmp_path / "out", params, shape)
    assert not list(tmp_path.iterdir())
    huggingface.save(tmp_path / "out", params, shape)


def test_a_full_disk_costs_the_journal_nothing_that_was_paid_for(tmp_path):
    path = tmp_path / "j.jsonl"
    reply = {"kind": "reply", "id": "p", "stage": "s", "index": 0, "prompt": "d", "texts": ["x" * 500]}
    with journal.Journal(path, {}) as log:
        log.append(reply)
        whole = path.read_bytes()
        with disk_of(len(whole) + 100), pytest.raises(OSError, match="File too large"):
            log.append(reply | {"index": 1})  # a hundred bytes of it fit
        assert path.read_bytes() == whole and log.reply(("p", "s", 1, "d")) is None
        log.append(reply | {"index": 1})
    with journal.Journal(path, {}) as log:
        assert [log.reply(("p", "s", i, "d"))["index"] for i in (0, 1)] == [0, 1]
