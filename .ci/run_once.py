"""pytest plugin for .ci/run: over several runs each test passes once, and none goes unrun unnoticed.

Tests listed in the file $CI_PASSED are left out, those that pass are added to it. The file $CI_PASSED.found has all
that a run over every file found, also slow ones, and the files that it could not read; `python run_once.py` prints the
files with tests that have not passed yet, so that the last run need not import the others.

With CI_COMPLETE=1, in the run that has every package installed, a skipped test is a failure; the reasons that count are
the folder shared/data beside the repository and a browser, which not every machine has, and a model of 240 MB.
"""

import os
from pathlib import Path

import pytest

PASSED = Path(os.environ["CI_PASSED"])
FOUND = PASSED.with_suffix(".found")
COMPLETE = os.environ.get("CI_COMPLETE") == "1"
not_run: list[str] = []


def listed(file: Path) -> set[str]:
    """Reads the tests that a file lists."""
    return set(file.read_text().splitlines()) if file.exists() else set()


def add(file: Path, tests: list[str]) -> None:
    """Adds tests to those that a file lists, in one write: several processes share the file."""
    with file.open("a") as opened:
        opened.write("".join(test + "\n" for test in tests))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if getattr(config, "workerinput", {}).get("workerid", "gw0") == "gw0":  # all workers find the same
        add(FOUND, [item.nodeid for item in items])
    done = listed(PASSED)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_collectreport(report):
    if report.skipped:
        add(FOUND, [report.nodeid])
    note_skip(report)


def pytest_runtest_logreport(report):
    note_skip(report)
    if report.when == "call" and report.passed:
        add(PASSED, [report.nodeid])


def note_skip(report):
    if COMPLETE and report.skipped:
        *_, reason = report.longrepr
        if not any(missing in reason for missing in ("shared/data", "needs Chromium", "gemma3-270m")):
            not_run.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session):
    if not_run:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for line in not_run:
        terminalreporter.write_line(f"NOT RUN {line}", red=True)


if __name__ == "__main__":
    print(*sorted({test.split("::")[0] for test in listed(FOUND) - listed(PASSED)}))
