"""Runs a command: its flags first, then the imports, which take seconds; an error is one line, not a stack trace."""

import contextlib
import importlib
import io
import logging as standard_logging
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from glob import glob
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace

from absl import flags, logging

import sgpo_jax
from sgpo_jax import config as configs
from sgpo_jax.cli import parsing
from sgpo_jax.cli.command import Command
from sgpo_jax.cli.help import help_text

INTERRUPTED = 130  # exit status after Ctrl-C


def start(name: str, command: Command, arguments: Sequence[str] | None = None) -> None:
    """Runs a command with the arguments of the command line.

    Args:
      name: of the command, for messages and help.
      command: its flags and its function.
      arguments: without the program's name; None takes those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):  # whose encoding may lack what a name or a server's words have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with readable():
            if any(word in ("--help", "-h", "-help", "--helpfull", "--helpshort") for word in arguments):
                file = parsing.named_file(arguments)[0] if command.config else ""
                config = (parsing.load(file) if file else configs.base()) if command.config else None
                print(help_text(name, command, config, file), end="", flush=True)
            elif "--version" in arguments:
                print(f"sgpo_jax {sgpo_jax.__version__}")
            else:
                _leave_out_libtpu()  # before JAX is imported
                config, given = parsing.parse(command, arguments)
                _run(name, command, config, given)
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        sys.exit(f"sgpo_jax: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("\nsgpo_jax: stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Ends the block inside without a word once nobody reads its output any more, such as `head`, which has enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, select.POLLOUT)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(name: str, command: Command, config: configs.ConfigDict | None, given: SimpleNamespace) -> None:
    # JAX and Orbax log their steps, and log the errors that they raise a second time with a stack trace.
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").disabled = True
    if command.announced:
        _announce(name, command, given)
    module, _, function = command.run.partition(":")
    run = getattr(importlib.import_module(module), function)

    from sgpo_jax.runtime import distributed, mirror  # they import JAX
    from sgpo_jax.runtime.preemption import Preempted

    with distributed.together(), mirror.closing():
        try:
            run(*([config] if config is not None else []), given)
        except Preempted as stopped:
            print(f"sgpo_jax: {stopped}", flush=True)
            code = stopped.code
        else:
            code = 0
    if code:
        sys.exit(code)


def _announce(name: str, command: Command, given: SimpleNamespace) -> None:
    """Prints the version and the folder at once, and the devices as soon as JAX has found them."""
    folder = getattr(given, command.folder, None)
    if getattr(given, "process", None):  # the first process prints
        return
    where = f", {command.folder} {folder}" if folder else ""
    print(f"sgpo_jax {sgpo_jax.__version__} {name}{where}", flush=True)
    if not command.processes or given.distributed or given.coordinator:
        return  # no device may be used before the processes have met, nor by the lab, whose workers use them
    started = time.perf_counter()
    import jax

    try:
        device = jax.devices()[0]
    except RuntimeError:
        return  # the command says what is wrong with the devices
    seconds = time.perf_counter() - started
    print(f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}", end="")
    print(f", found in {seconds:.0f} s" * (seconds >= 5), flush=True)


def _leave_out_libtpu() -> None:
    """Makes JAX look for TPUs only where there can be some: libtpu would search for seconds, and fill the screen."""
    if "JAX_PLATFORMS" in os.environ or util.find_spec("libtpu") is None:
        return
    if not _may_have_tpus() and not metadata.entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _may_have_tpus() -> bool:
    """Returns whether the machine has an accelerator of Google's, judged by its devices and its PCI bus."""
    if glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"):
        return True
    cards = [Path(path) for path in glob("/sys/bus/pci/devices/*")]
    ids = [tuple((card / name).read_text().strip() for name in ("vendor", "device")) for card in cards]
    return any(vendor == "0x1ae0" and device != "0x0042" for vendor, device in ids)  # 0x0042 is a network card
