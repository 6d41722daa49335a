"""Starts modules as `python -m` does, in forks of a process that has imported what they need.

Of a run of a tiny model, imports are a third of the processor's time where torch is installed.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import traceback
from tempfile import NamedTemporaryFile

from helpers.paths import ROOT
from helpers.variables import adopt

_CONTEXT = multiprocessing.get_context("forkserver")
# Runs import the last two where they first write; tensorboardX imports every package that it can use, such as torch.
_CONTEXT.set_forkserver_preload(["sgpo_jax.commands.train", "sgpo_jax.report.figures", "tensorboardX"])
_READ_LATER = {"JAX_COORDINATOR_PORT"}


def _main(module, arguments, environment, files):
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.clear()
    adopt(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = traceback.format_exc().rstrip()
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
        code = 1
    atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
    sys.exit(code)


class Fork:
    """A process with the methods of `subprocess.Popen` that tests need.

    Args:
      module, arguments: as after `python -m`.
      environment: its variables. JAX has read most of its own when it was imported: they must be this process's.
    """

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str]):
        for name in (os.environ.keys() | environment.keys()) - _READ_LATER:
            assert not name.startswith("JAX_") or environment.get(name) == os.environ.get(name), name
        self._files = [NamedTemporaryFile("r") for _ in ("stdout", "stderr")]
        names = [file.name for file in self._files]
        self._process = _CONTEXT.Process(target=_main, args=(module, arguments, dict(environment), names))
        self._process.start()

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process is running."""
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(9)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end and returns what was written to both streams."""
        self._process.join(timeout)
        assert self.poll() is not None, f"{self._process.pid} has not ended after {timeout} s"
        return tuple(file.read() for file in self._files)
