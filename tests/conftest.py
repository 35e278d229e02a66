"""Counts that tests leave for the end of a pytest run: kills survived, files read, files refused."""

import pytest

import utils

COUNTS = pytest.StashKey()


@pytest.fixture
def count(request):
    """A function that adds a number to a named count, shown when pytest ends."""
    counts = request.config.stash.setdefault(COUNTS, {})

    def add(what, number):
        counts[what] = counts.get(what, 0) + number

    return add


def pytest_unconfigure(config):
    """End the workers of loaders that a failed test left alive: they ignore SIGTERM."""
    utils.end_workers()


def pytest_terminal_summary(terminalreporter, config):
    """Show the counts."""
    for what, number in config.stash.get(COUNTS, {}).items():
        terminalreporter.write_line(f"{number} {what}")
