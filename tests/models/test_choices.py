"""What computes on a CPU follows the processor, and changes numbers by rounding only."""

import copy

import pytest
import torch
from torch import nn

from models import use_onednn
from models.fast import attention, choices, linear
from models.fast.choices import MEASURED, PYTORCH, Choices

INTEL = MEASURED["GenuineIntel", "amx_bf16"]


@pytest.mark.parametrize(
    "found, expected",
    [
        (("GenuineIntel", "amx_bf16"), INTEL),
        (("AuthenticAMD", "avx512f"), Choices("onednn", "onednn", "blocked", "blocked")),
        (("GenuineIntel", "avx2"), PYTORCH),
        (("", ""), PYTORCH),
    ],
)
def test_choices_are_those_measured_for_the_processor_and_otherwise_pytorchs(monkeypatch, found, expected):
    monkeypatch.setattr(choices, "processor", lambda: found)
    monkeypatch.setattr(choices, "has_onednn", lambda: True)
    assert choices.chosen.__wrapped__() == expected
    monkeypatch.setattr(choices, "has_onednn", lambda: False)
    assert choices.chosen.__wrapped__() == PYTORCH


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", ""])
def test_the_processor_is_read_from_the_system(monkeypatch, tmp_path, vendor):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(choices, "CPUINFO", str(path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for flags, widest in (("fpu avx2", "avx512f"), ("fpu amx_bf16 amx_tile", "amx_bf16")):
        path.write_text(f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
        assert choices.processor.__wrapped__() == (vendor, widest)


def test_an_unknown_processor_gets_pytorchs_own(choose):
    choose(PYTORCH)
    layer = nn.Linear(3, 4)
    use_onednn(layer)
    assert "forward" not in vars(layer)
    for dtype in (torch.float32, torch.bfloat16):
        assert attention.choose_backend(torch.zeros(1, 4, 48, dtype=dtype), 1) == "sdpa"


@pytest.mark.skipif(not choices.has_onednn(), reason="needs oneDNN on x86")
@pytest.mark.parametrize("library", ["onednn", "pytorch"])
def test_the_gradient_of_weights_comes_from_the_chosen_library_and_is_the_same(choose, monkeypatch, library):
    choose(Choices("onednn", library, "blocked", "sdpa"))
    plain = nn.Linear(24, 72)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    x, calls, compute = torch.randn(50, 24, requires_grad=True), [], linear._linear
    monkeypatch.setattr(linear, "_linear", lambda *arguments: calls.append(1) or compute(*arguments))
    for layer in (plain, fast):
        layer(x).square().sum().backward()
    assert len(calls) == dict(onednn=3, pytorch=2)[library]  # forward, input and perhaps weight
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
    assert attention.choose_backend(torch.zeros(1, 4, 48, dtype=torch.bfloat16), 1) == "sdpa"
    assert attention.choose_backend(torch.zeros(1, 4, 48), 1) == "blocked"
