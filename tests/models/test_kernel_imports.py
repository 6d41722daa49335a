"""Importing the package imports no kernel, and tracing for one platform imports that platform's only."""

import ast
import subprocess
import sys

from helpers.paths import ROOT

CODE = """
import sys
import sgpo_jax.losses, sgpo_jax.training.rl, sgpo_jax.evaluate
from sgpo_jax.models import attention

def kernels():
    return sorted({name.split(".")[4] for name in sys.modules if name.startswith("jax.experimental.pallas.ops.")})

print(kernels())
for platform in ("cpu", "gpu", "tpu"):
    attention.platform = lambda: platform
    attention.cache_shape(8, 128)
    print(kernels())
    for name in [name for name in sys.modules if ".pallas.ops." in name]:
        del sys.modules[name]
"""


def test_kernels_are_imported_where_they_run():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [ast.literal_eval(line) for line in result.stdout.splitlines()] == [[], [], ["gpu"], ["tpu"]]
