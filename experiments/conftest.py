"""For all tests of experiments/: one thread each, and the table of what the project survives."""

import datetime
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

ROWS = []  # of the table in docs/robustness.md, which python -m pytest -m stress prints


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks of tests are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def survived(request):
    """survived("kill -9 of training", 200, "resumed, and …") after the last assertion of a stress test."""

    def add(fault: str, tried: int, outcome: str) -> None:
        if request.node.get_closest_marker("stress"):
            ROWS.append((fault, f"{tried:,}", outcome))

    return add


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.write_line(f"\n`python -m pytest -m stress`, {datetime.date.today()}\n")
        for row in (("fault or input", "tried", "what happened"), ("---",) * 3, *ROWS):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
