"""A copy of the launch scripts, with fake tools that record their calls."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from helpers.paths import ROOT

TOOLS = "gcloud kubectl docker sbatch srun squeue scontrol git tar rm sudo mountpoint python3".split()

# A call is its words, and its standard input where it reads one, each followed by a 0 byte. A line break ends the call.
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
    """A copy of the scripts, and fakes of the machines that they reach."""

    tree: Path  # with launch/ and configs/
    tools: Path  # the folder of recording programs
    home: Path  # of the user on a TPU VM
    calls: Path

    def tool(self, name: str, text: str) -> None:
        """Makes a tool run a script after it has recorded the call."""
        (self.tools / name).write_text(RECORD + text)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs a launch script with additional environment variables."""
        return self.bash(str(self.tree / "launch" / script), *arguments, **environment)

    def bash(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs bash with the fake tools."""
        return subprocess.run(
            ["bash", *arguments], capture_output=True, text=True, timeout=60, cwd=self.tree.parent,
            env=self.environment() | environment,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Returns the environment variables of a script."""
        path = f"{self.tools}:{os.environ['PATH']}"
        changes = {"PATH": path, "CALLS": str(self.calls), "HOME": str(self.home), "HOSTNAME": "t1v-n-0a1b-w-3"}
        return os.environ | changes

    def recorded(self) -> list[list[str]]:
        """Returns the calls since the last time, each as its words; without questions to git about the tree."""
        text = self.calls.read_text() if self.calls.exists() else ""
        self.calls.unlink(missing_ok=True)
        calls = [call.split("\0")[:-1] for call in text.split("\n\0")[:-1]]
        return [call for call in calls if call[0] != "git" or not {"status", "cat-file"} & set(call)]


def bench(folder: Path) -> Bench:
    """Makes a bench in a folder."""
    result = Bench(folder / "a tree", folder / "bin", folder / "home", folder / "calls")
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, result.tree / name)
    result.tools.mkdir()
    result.home.mkdir()
    for name in TOOLS:
        result.tool(name, "")
        (result.tools / name).chmod(0o755)
    return result
