"""Tests of the models take our faster ways on any x86 processor, whatever is chosen for this one."""

import pytest

from models.fast import attention, choices, cpu, fused_block, linear


@pytest.fixture
def choose(monkeypatch):
    """A function that makes this machine one with given choices."""

    def change(found):
        for module in (attention, cpu, fused_block, linear):
            monkeypatch.setattr(module, "chosen", lambda: found)

    return change


@pytest.fixture(autouse=True)
def ours(choose):
    if choices.has_onednn():
        choose(choices.MEASURED["AuthenticAMD", "avx512f"])
