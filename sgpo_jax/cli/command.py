"""Commands as data: their flags, the config that they take, and the function that runs them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """A flag of a command."""

    name: str
    help: str
    kind: type = str  # str, int, float or bool
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()  # allowed values of a text
    low: float | None = None  # least allowed number
    high: float | None = None  # largest allowed number


@dataclass(frozen=True)
class Command:
    """A command, as its flags and its help need it. The module that runs it is imported after the flags are read."""

    summary: str  # what it does, in one sentence
    run: str  # "module:function" with function(config, flags), or function(flags) for a command without a config
    flags: tuple[Flag, ...] = ()
    # "file": --config must be given. "run": without --config it is that of the run that the flag `folder` names.
    # "any": without a run either, it is the paper's recipe. "": the command takes no config.
    config: str = "file"
    folder: str = "workdir"  # flag that names the folder of a run
    fields: tuple[str, ...] = ()  # prefixes of the fields of the config that its help shows; "" for all
    examples: tuple[str, ...] = ()
    arguments: str = ""  # name of the list of words without a flag, where it takes some
    processes: bool = False  # several processes can run it together
    announced: bool = True  # its output opens with the version and the folder, and the devices that it uses itself

    @property
    def all_flags(self) -> tuple[Flag, ...]:
        """Returns its own flags and those of a command that several processes can run."""
        return self.flags + PROCESSES * self.processes


PROCESSES = (
    Flag("distributed", "One process of several; TPU pod, SLURM, Open MPI or Kubernetes.", bool, False),
    Flag("coordinator", "One process of several, anywhere: HOST:PORT of the first."),
    Flag("processes", "With --coordinator: the number of processes.", int),
    Flag("process", "With --coordinator: the index of this one, from 0.", int),
)
