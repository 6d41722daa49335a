"""The launch scripts in a tree of their own, beside programs that only write down what they are called with."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from helpers.paths import ROOT

TOOLS = "gcloud kubectl docker sbatch srun squeue scontrol git tar rm sudo mountpoint python3".split()

# Each call is its words and, where it reads one, its standard input, ended by 0; a call ends with a line of its own.
RECORD = """#!/bin/bash
{
    printf '%s\\0' "${0##*/}" "$@"
    for word in "$@"; do
        [[ $word != - ]] || printf 'stdin: %s\\0' "$(cat)"
    done
    printf '\\n\\0'
} >>"$CALLS"
for ((i = 1; i < $#; i++)); do # git archive --output FILE
    [[ ${!i} != --output ]] || { j=$((i + 1)); echo archive >"${!j}"; }
done
"""


class Bench(NamedTuple):
    """A copy of the scripts, and what stands for the machines that they reach."""

    tree: Path  # with launch/ and configs/
    tools: Path  # the folder of recording programs
    home: Path  # of the user on a TPU VM
    calls: Path

    def tool(self, name: str, text: str) -> None:
        """Gives a tool something to do after it has recorded the call."""
        (self.tools / name).write_text(RECORD + text)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return self.bash(str(self.tree / "launch" / script), *arguments, **environment)

    def bash(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *arguments], capture_output=True, text=True, timeout=60, cwd=self.tree.parent,
            env=self.environment() | environment,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        path = f"{self.tools}:{os.environ['PATH']}"
        ours = {"PATH": path, "CALLS": str(self.calls), "HOME": str(self.home), "HOSTNAME": "t1v-n-0a1b-w-3"}
        return os.environ | ours

    def recorded(self) -> list[list[str]]:
        """The calls since the last time this was asked."""
        text = self.calls.read_text() if self.calls.exists() else ""
        self.calls.unlink(missing_ok=True)
        return [call.split("\0")[:-1] for call in text.split("\n\0")[:-1]]


def bench(folder: Path) -> Bench:
    made = Bench(folder / "a tree", folder / "bin", folder / "home", folder / "calls")
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, made.tree / name)
    made.tools.mkdir()
    made.home.mkdir()
    for name in TOOLS:
        made.tool(name, "")
        (made.tools / name).chmod(0o755)
    return made
