"""The worked example of CONTRIBUTING, carried out on a copy of the package: three edits make a knob of a method."""

import re
import shutil
import subprocess
import sys

import pytest
from helpers.paths import ROOT

# Run in the copy: the knob is in the config, is checked, and changes the update as its formula says.
USE = """
import jax, jax.numpy as jnp, numpy as np, optax
from helpers.batches import CONFIG, make_batch, make_params
from helpers.configs import load
from helpers.paths import ROOT
from sgpo_jax import config as configs, config_checks, losses
from sgpo_jax.training import Forward, Objective, Weighting, init_state, make_update, pack_batch
import sgpo_jax
print(sgpo_jax.__file__)

def distillation(**changes):
    config = configs.base()
    config.rl.update({"delta": float("inf")} | changes)
    optimizer = optax.sgd(1.0)
    update = make_update(Forward(CONFIG), optimizer, Objective.from_config(config.rl))
    packed = pack_batch(make_batch(), Weighting(), micro_batch=100, chunk=8)
    _, metrics = update(init_state(make_params(), optimizer), packed)
    return metrics

default, capped = distillation(), distillation(kl_cap=0.25)
assert float(default["token_kl_max"]) > 0.25, "some token is above the cap"
assert 0 < float(capped["loss_kd"]) < float(default["loss_kd"])
assert float(capped["loss_kd"]) <= 0.25 * float(capped["alpha"]) + 1e-6
assert np.isclose(float(distillation(kl_cap=1e9)["loss_kd"]), float(default["loss_kd"]))

config = load(ROOT / "configs/quickstart.py")
config.rl.kl_cap = -1.0
try:
    config_checks.check(config)
except ValueError as error:
    print(error)
"""


def example() -> str:
    """The diff in CONTRIBUTING."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    return diff


def test_the_example_is_at_most_three_edits():
    files = re.findall(r"^\+\+\+ b/(.*)$", example(), re.M)
    assert files == ["sgpo_jax/config.py", "sgpo_jax/config_checks.py", "sgpo_jax/training/objective.py"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_three_edits_make_a_knob(tmp_path):
    shutil.copytree(ROOT / "sgpo_jax", tmp_path / "sgpo_jax", ignore=shutil.ignore_patterns("__pycache__"))
    applied = subprocess.run(
        ["git", "apply", "-"], input=example(), cwd=tmp_path, capture_output=True, text=True
    )
    assert applied.returncode == 0, applied.stderr
    program = f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'tests')!r}]\n{USE}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    place, message = done.stdout.splitlines()
    assert place == str(tmp_path / "sgpo_jax/__init__.py")
    assert message.startswith("config.rl.kl_cap=-1.0: must be above 0")
