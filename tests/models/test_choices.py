"""What computes on a CPU follows the processor, and changes numbers by rounding only."""

import copy

import pytest
import torch
from helpers import micro
from torch import nn

from models import use_onednn
from models.fast import attention, choices, cpu, fused_block, linear
from models.fast.choices import MEASURED, PYTORCH

INTEL = MEASURED["GenuineIntel", "amx_bf16"]


@pytest.mark.parametrize(
    "found, expected",
    [
        (("GenuineIntel", "amx_bf16"), INTEL),
        (("AuthenticAMD", "avx512f"), MEASURED["AuthenticAMD", "avx512f"]),
        (("GenuineIntel", "avx2"), PYTORCH),
        (("", ""), PYTORCH),
    ],
)
def test_choices_are_those_measured_for_the_processor_and_otherwise_pytorchs(monkeypatch, found, expected):
    monkeypatch.setattr(choices, "processor", lambda: found)
    monkeypatch.setattr(choices, "has_onednn", lambda: True)
    assert choices.chosen() == expected
    monkeypatch.setattr(choices, "has_onednn", lambda: False)
    assert choices.chosen() == PYTORCH


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
        assert attention.choose_backend(torch.zeros(1, 4, 48, dtype=dtype), torch.zeros(1, 4, 4)) == "sdpa"


@pytest.mark.skipif(not choices.has_onednn(), reason="needs oneDNN on x86")
@pytest.mark.parametrize("library", ["onednn", "pytorch"])
def test_the_gradient_of_weights_comes_from_the_chosen_library_and_is_the_same(choose, monkeypatch, library):
    choose(INTEL._replace(weight_gradient=library))
    plain = nn.Linear(24, 72)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    x, calls, compute = torch.randn(50, 24, requires_grad=True), [], linear._linear
    monkeypatch.setattr(linear, "_linear", lambda *arguments: calls.append(1) or compute(*arguments))
    for layer in (plain, fast):
        layer(x).square().sum().backward()
    assert len(calls) == dict(onednn=3, pytorch=2)[library]  # forward, input and perhaps weight
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)


def test_attention_is_chosen_by_dtype_and_whether_it_is_trained(choose):
    choose(PYTORCH._replace(attention_float32="eager", attention_gradients="blocked"))
    qkv, bias = torch.zeros(1, 4, 48), torch.zeros(1, 4, 4)
    trained = qkv.clone().requires_grad_()
    found = [attention.choose_backend(x, bias) for x in (qkv, qkv.bfloat16(), trained)]
    assert found == ["eager", "sdpa", "blocked"]


@pytest.mark.skipif(not choices.has_onednn(), reason="needs oneDNN on x86")
@pytest.mark.parametrize("processor", [*MEASURED, ("", "")])
def test_every_choice_compiles_into_one_graph_and_gives_the_gradients_of_pytorch(monkeypatch, processor):
    """With the real table, which torch.compile must be able to read."""
    monkeypatch.setattr(choices, "processor", lambda: processor)
    for module in (attention, cpu, fused_block, linear):
        monkeypatch.setattr(module, "chosen", choices.chosen)
    torch._dynamo.reset()
    plain = micro(depths=(1, 1), num_heads=(2, 4), shuffle_size=(2, 1))
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    fast.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    images = torch.randn(2, 3, 16, 16)
    for model in (plain, fast):
        model(images).square().mean().backward()
    for (name, expected), found in zip(plain.named_parameters(), fast.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(not choices.has_onednn(), reason="needs oneDNN on x86")
@pytest.mark.parametrize("library", ["onednn", "pytorch"])
def test_gelu_comes_from_the_chosen_library_and_is_the_same(choose, monkeypatch, library):
    choose(INTEL._replace(gelu=library))
    x, weight, fused, compute = torch.randn(50, 24), torch.randn(72, 24), [], linear.onednn_linear
    monkeypatch.setattr(linear, "onednn_linear", lambda *given: fused.append(given[3]) or compute(*given))
    found = linear._linear(x, weight, None, True, 72)
    assert fused == [library == "onednn"]
    torch.testing.assert_close(found, nn.functional.gelu(x @ weight.T), rtol=1e-4, atol=1e-4)
