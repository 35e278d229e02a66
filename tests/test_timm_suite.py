"""timm's expectations of its models, for the six names: T here, S and B in `make test-slow`."""

import pytest
import timm
from timm_suite import CHECKS

NAMES = [
    pytest.param(name, marks=[] if "tiny" in name else pytest.mark.slow) for name in timm.list_models("msg_*")
]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_timm_suite(check, name, count):
    check(name)
    count("checks of timm's suite passed", 1)
