"""Runs commands of sgpo_jax as `python -m` does, each in a fork of this process, so that the imports run once.

    python fork_commands.py FILE

FILE holds a JSON list of [module, [argument, ...]]. The output is a list of [exit code, stdout, stderr].
"""

import importlib
import json
import os
import runpy
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")  # jax warns of forks, but none of its threads is running yet
commands = json.loads(Path(sys.argv[1]).read_text())
for module in {module for module, _ in commands}:
    importlib.import_module("sgpo_jax.commands." + module.removeprefix("sgpo_jax.").replace("main", "train"))

children = []
for module, arguments in commands:
    files = [Path(sys.argv[1]).with_suffix(f".{len(children)}.{stream}") for stream in ("stdout", "stderr")]
    child = os.fork()
    if not child:
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit(0)
    children.append((child, files))

results = []
for child, files in children:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *(file.read_text() for file in files)])
print(json.dumps(results))
