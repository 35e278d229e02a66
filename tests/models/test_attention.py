"""Every way to compute attention in windows against the formula, gradients included."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers import ROOT, TESTS, logged
from packaging.version import Version

from models.fast import attention
from models.fast.attention import choose_backend, windowed_attention
from models.fast.attention_triton import triton_builds
from models.fast.choices import has_onednn
from models.msg_transformer import MSGTransformer
from utils import UserError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of windows in most cases."""
    monkeypatch.setattr(attention, "BLOCK", 4000)


def attention_case(windows, tokens, heads, dim, dtype=torch.float64, seed=0):
    """Random qkv and bias that require gradients, and an output gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (windows, tokens, 3 * heads * dim), (heads, tokens, tokens), (windows, tokens, heads * dim)
    qkv, bias, grad = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return qkv.requires_grad_(), bias.requires_grad_(), grad


def loop_attention(qkv, bias, scale, hidden=None):
    """Attention by the formula, a window and a head at a time, to the tokens that are not hidden."""
    heads, tokens = bias.shape[:2]
    dim = qkv.shape[2] // (3 * heads)
    windows = []
    for window, kept in zip(qkv, ~hidden if hidden is not None else [slice(None)] * len(qkv)):
        q, k, v = window.view(tokens, 3, heads, dim).unbind(1)
        each = [
            torch.softmax(scale * q[:, h] @ k[kept, h].T + bias[h][:, kept], dim=1) @ v[kept, h]
            for h in range(heads)
        ]
        windows.append(torch.cat(each, dim=1))
    return torch.stack(windows)


SHAPES = [(1, 1, 1, 16), (3, 50, 3, 32), (65, 7, 2, 24), (133, 5, 4, 8), (2, 145, 2, 64)]
TRITON_SHAPES = [(1, 1, 1, 64), (3, 50, 3, 32), (5, 7, 2, 24), (2, 64, 1, 16)]
TRITON_SHAPES += [(2, 65, 1, 48), (3, 145, 2, 16)]


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "blocked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_hidden", [False, True])
def test_every_backend_computes_the_formula_and_its_gradients(backend, shape, is_hidden):
    qkv, bias, grad = attention_case(*shape)
    hidden = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5 if is_hidden else None
    if is_hidden:
        hidden[:, 0] = False
    expected = loop_attention(qkv, bias, 0.3, hidden)
    out = windowed_attention(qkv, bias, 0.3, backend, hidden)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    wanted, found = (torch.autograd.grad(y, (qkv, bias), grad) for y in (expected, out))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        again = windowed_attention(qkv, bias, 0.3, backend, hidden)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "blocked"])
@pytest.mark.parametrize("is_hidden", [False, True])
def test_gradients_of_gradients_are_those_of_the_formula(backend, is_hidden):
    qkv, bias, grad = attention_case(65, 3, 2, 2)
    hidden = torch.arange(3).expand(65, 3) > 1 if is_hidden else None
    seconds = []
    for name in ("eager", backend):
        out = windowed_attention(qkv, bias, 0.3, name, hidden)
        first = torch.autograd.grad(out, (qkv, bias), grad, create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in first), (qkv, bias)))
    torch.testing.assert_close(*seconds, rtol=1e-10, atol=1e-12)
    few = None if hidden is None else hidden[:2]
    assert torch.autograd.gradgradcheck(
        lambda qkv, bias: windowed_attention(qkv, bias, 0.3, backend, few), (qkv[:2], bias)
    )


def relative_errors(shape, dtype, backend, device="cpu"):
    """Norms of the errors of output and gradients over those of float64, in units of the dtype's epsilon."""
    qkv, bias, grad = attention_case(*shape)
    expected = windowed_attention(qkv, bias, 0.3, "eager")
    wanted = (expected, *torch.autograd.grad(expected, (qkv, bias), grad))
    low = [tensor.detach().to(device, dtype).requires_grad_() for tensor in (qkv, bias)]
    out = windowed_attention(*low, 0.3, backend)
    found = (out, *torch.autograd.grad(out, low, grad.to(device, dtype)))
    errors = []
    for result, reference in zip(found, wanted):
        error = (result.detach().cpu().double() - reference.detach()).norm()
        errors.append((error / reference.norm().clamp(min=1e-3) / torch.finfo(dtype).eps).item())
    return errors


@pytest.mark.parametrize("backend", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_stay_within_the_rounding_of_their_dtype(backend, dtype):
    assert max(relative_errors((70, 50, 3, 32), dtype, backend)) < 5


def in_interpreter(code):
    """Run Python code that imports this file, with Triton's kernels interpreted; returns its JSON output."""
    path = os.pathsep.join(map(str, [ROOT, TESTS, TESTS / "models"]))
    environment = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=path, OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def triton_errors():
    """The errors of the kernels, with a window for each program and with several, in what can be interpreted.

    Those of the operator that torch.compile sees follow. Triton's interpreter multiplies the bits of bfloat16
    numbers rather than the numbers.
    """
    from models.fast import attention_kernels, attention_triton

    cases = [(shape, dtype) for shape in TRITON_SHAPES for dtype in (torch.float32, torch.float16)]
    errors = [relative_errors(shape, dtype, "triton") for shape, dtype in cases]
    errors.append(second_gradient_errors())
    attention_kernels.windows_per_program = lambda windows, heads: 2
    errors += [relative_errors(shape, dtype, "triton") for shape, dtype in cases[2:6]]
    attention_triton._Triton = SimpleNamespace(apply=lambda *args: attention_triton._triton(*args[:3]))
    return errors + [relative_errors(shape, dtype, "triton") for shape, dtype in cases[:2]]


def second_gradient_errors():
    """Those of gradients of the kernels' gradients, in units of float32's epsilon."""
    qkv, bias, grad = attention_case(2, 5, 2, 16, torch.float32)
    seconds = []
    for backend in ("triton", "eager"):
        out = windowed_attention(qkv, bias, 0.3, backend)
        first = torch.autograd.grad(out, (qkv, bias), grad, create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in first), (qkv, bias)))
    return [((a - b).norm() / b.norm() / torch.finfo(a.dtype).eps).item() for a, b in zip(*seconds)]


triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="this Triton's interpreter cannot loop with this NumPy",
)


@interpreted
def test_triton_kernels_compute_the_formula_and_its_gradients():
    errors = in_interpreter("import json, test_attention as t; print(json.dumps(t.triton_errors()))")
    assert len(errors) == 2 * len(TRITON_SHAPES) + 1 + 4 + 2
    assert max(error for case in errors for error in case) < 8, errors


@pytest.mark.parametrize("tokens, dim, kind", [(50, 32, "bf16"), (145, 64, "bf16"), (145, 32, "fp32")])
@pytest.mark.parametrize("arch, shared", [(80, 163 << 10), (90, 227 << 10)])
def test_triton_kernels_compile_for_gpus_within_their_shared_memory(tokens, dim, kind, arch, shared):
    """Compilation needs no GPU: NVIDIA A100 (80) and H100 (90)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.fast import attention_kernels as kernels

    _, constants = kernels._launch(torch.empty(64, tokens, 9 * dim), torch.empty(3, tokens, tokens))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = dict(scale="fp32", windows="i32", bias="*fp32", sums="*fp32")
    for kernel in (kernels._forward, kernels._backward):
        signature = {
            name: "constexpr" if name in constants else types.get(name, f"*{kind}")
            for name in kernel.arg_names
        }
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert compiled.metadata.shared <= shared


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backends_on_a_gpu_compute_the_formula(dtype, backend):
    for shape in (*TRITON_SHAPES, (4096, 50, 3, 32), (300, 145, 6, 32)):
        assert max(relative_errors(shape, dtype, backend, "cuda")) < 8, shape


def test_triton_says_why_it_cannot_run():
    if torch.cuda.is_available():
        pytest.skip("it can")
    with pytest.raises(ValueError, match="MODEL.MSG.ATTENTION is triton, but Triton needs a GPU .* use sdpa"):
        MSGTransformer(attention="triton")
    qkv, bias, _ = attention_case(2, 3, 1, 16)
    with pytest.raises(UserError, match="needs a GPU"):
        windowed_attention(qkv, bias, 1.0, "triton")


def test_the_choice_follows_the_device():
    qkv, bias = torch.zeros(1, 4, 48), torch.zeros(1, 4, 4)
    assert choose_backend(qkv, bias) == ("blocked" if has_onednn() else "sdpa")
    assert choose_backend(qkv.to("meta"), bias) == "sdpa"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_takes_its_kernels_for_what_they_can_compute():
    def chosen(dtype, tokens=50):
        return choose_backend(torch.zeros(1, tokens, 96, dtype=dtype, device="cuda"), torch.zeros(1, 4, 4))

    assert chosen(torch.bfloat16) == chosen(torch.float16) == "triton"
    assert chosen(torch.float32) == chosen(torch.bfloat16, tokens=257) == "sdpa"


def test_a_gpu_without_a_compiler_takes_pytorchs_kernels(monkeypatch):
    """Triton is missing its C compiler, say: a warning, no error."""

    def fails(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("models.fast.attention_triton._Triton", SimpleNamespace(apply=fails))
    triton_builds.cache_clear()
    with logged() as lines:
        assert not triton_builds()
    triton_builds.cache_clear()
    assert len(lines) == 1 and "as Triton cannot build ours here" in lines[0]
