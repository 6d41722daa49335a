"""pytest plugin for .ci/run: over several runs each test passes once, and none goes unrun unnoticed.

Tests listed in the file $CI_PASSED are left out, those that pass are added to it. With CI_COMPLETE=1,
in the run that has every package installed, a skipped test is a failure; the reasons that count are
the folder shared/data beside the repository and a browser, which not every machine has, and a model
of 240 MB.
"""

import os
from pathlib import Path

PASSED = Path(os.environ["CI_PASSED"])
COMPLETE = os.environ.get("CI_COMPLETE") == "1"
not_run: list[str] = []


def pytest_collection_modifyitems(config, items):
    done = set(PASSED.read_text().splitlines()) if PASSED.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_collectreport(report):
    note_skip(report)


def pytest_runtest_logreport(report):
    note_skip(report)
    if report.when == "call" and report.passed:
        with PASSED.open("a") as file:
            file.write(report.nodeid + "\n")


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
