"""timm's expectations of its models, for all names: T and CIFAR-10's here, S and B in `make test-slow`."""

import pytest
import timm
from timm_suite import CHECKS

NAMES = [
    pytest.param(name, marks=pytest.mark.slow if "small" in name or "base" in name else [])
    for name in timm.list_models("msg_*")
]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_timm_suite(check, name, count):
    check(name)
    count("checks of timm's suite passed", 1)
