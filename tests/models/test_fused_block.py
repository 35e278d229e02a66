"""Blocks in two passes over the tokens, against the layers that they stand for."""

import copy
import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CVPR22, fill_weights, golden_images, micro, reference
from torch import nn

from models import compile_model, inference, use_onednn
from models.fast import fused_block
from models.fast.choices import MEASURED
from models.msg_transformer import MSGTransformer

pytestmark = pytest.mark.skipif(not fused_block.load_library(), reason="needs AVX-512 and a C++ compiler")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def calls(choose, monkeypatch):
    """An entry for every block that was computed in two passes."""
    choose(MEASURED["GenuineIntel", "amx_bf16"])
    found, is_current = [], fused_block.FusedBlock.is_current
    monkeypatch.setattr(
        fused_block.FusedBlock, "is_current", lambda self: is_current(self) and found.append(1) is None
    )
    return found


def computed(model, images, dtype=FLOAT32, **arguments):
    """The maps of the last stage, or logits, as evaluation computes them."""
    use_onednn(model)
    with inference(model, dtype), torch.autocast("cpu", BFLOAT16, enabled=dtype == BFLOAT16):
        return model.forward_stages(images, **arguments)[-1] if arguments else (model(images),)


def require_bfloat16(dtype):
    if dtype not in fused_block.load_library():
        pytest.skip("needs bfloat16 in the processor")


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("size", [(32, 32), (36, 32), (41, 27), (8, 8)])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(tokens=False, patch_norm=False), dict(manip_type="mean"), dict(manip_type="none", **CVPR22)]
    + [dict(qkv_bias=False, qk_scale=0.3, mlp_ratio=3.0), dict(window_size=2, num_heads=(1, 2, 3), ape=True)],
)
def test_logits_of_any_size_are_those_of_the_formula(choose, calls, changes, size, dtype):
    require_bfloat16(dtype)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    found = [*computed(micro(**changes), images, dtype)]
    assert calls
    choose(MEASURED["AuthenticAMD", "avx512f"])
    found += computed(micro(**changes), images, dtype)
    expected = micro(**changes).double()(images.double())
    ours, of_layers = ((logits - expected).norm() / expected.norm() for logits in found)
    assert ours < 1.5 * of_layers + 1e-6


def test_images_of_several_sizes_in_a_batch_are_those_of_the_formula(calls):
    sizes = [(40, 22), (31, 44), (8, 9)]
    images = torch.randn(3, 3, 40, 44, generator=torch.Generator().manual_seed(1))
    for image, (height, width) in zip(images, sizes):
        image[:, height:], image[:, :, width:] = 0, 0
    found = computed(micro(), images, sizes=sizes)
    expected = micro().double().forward_stages(images.double(), sizes=sizes)[-1]
    assert calls
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_golden_numbers_are_reproduced(calls):
    golden = reference("golden.json")["msg_tiny_p4_win7_224"]
    model = fill_weights(MSGTransformer(drop_path_rate=0.0)).eval()
    (logits,) = computed(model, golden_images(224).float())
    assert len(calls) == 12 and logits.sum().item() == pytest.approx(golden["logits_sum"], rel=1e-4)
    assert logits.square().sum().item() == pytest.approx(golden["logits_sqsum"], rel=1e-4)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_neither_threads_nor_the_other_windows_of_a_batch_change_a_bit(dtype):
    require_bfloat16(dtype)
    model, x = micro(), torch.randn(48, 17, 48)
    use_onednn(model)
    before, results = torch.get_num_threads(), []
    with inference(model, dtype):
        fused = model.layers[0].blocks[0].fixed.kept[0]
        for threads, windows in ((1, x), (2, x), (3, x), (64, x), (2, x[40:]), (2, x[:1]), (64, x[:1])):
            torch.set_num_threads(threads)
            results.append(fused.mlp(fused.attend(windows), windows))
    torch.set_num_threads(before)
    for result, part in zip(results, [slice(None)] * 4 + [slice(40, None), slice(1), slice(1)]):
        assert torch.equal(result, results[0][part])


def test_a_model_whose_weights_are_bfloat16_keeps_its_dtype(calls):
    require_bfloat16(BFLOAT16)
    model = micro().bfloat16()
    use_onednn(model)
    images = golden_images(36)
    with inference(model):
        found = model(images.bfloat16())
    expected = micro().double()(images)
    assert calls and found.dtype == BFLOAT16 and (found - expected).norm() < 3e-2 * expected.norm()


def test_neither_the_default_dtype_nor_the_default_device_changes_anything():
    model, x = micro(), torch.randn(2, 17, 48)
    use_onednn(model)
    with inference(model):
        fused = model.layers[0].blocks[0].fixed.kept[0]
        expected = fused.mlp(fused.attend(x), x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), inference(model):
            fused = model.layers[0].blocks[0].fixed.kept[0]
            found = fused.mlp(fused.attend(x), x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_threads_share_a_model(calls):
    model, images = micro(), golden_images(36).float()
    expected = computed(model, images)[0]
    with inference(model), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: torch.no_grad()(model)(images), range(16)))
    assert len(calls) == 6 * 17
    for result in found:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_values_that_are_no_numbers_stay_so():
    images = golden_images(32).float()
    images[0, 0, 5, 7] = torch.nan
    (logits,) = computed(micro(), images)
    assert logits[0].isnan().all() and logits[1].isfinite().all()


class OtherLayer(nn.Linear):
    """A layer that somebody put in place of one of ours."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["hook", "weight", "layer", "dropout", "autocast", "gradients", "backend"])
def test_what_somebody_changes_or_watches_is_computed_layer_by_layer(calls, change):
    model, images = micro(attention="sdpa" if change == "backend" else "auto"), golden_images(32).float()
    use_onednn(model)
    block, seen = model.layers[0].blocks[0], []
    with inference(model):
        if change == "hook":
            block.mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
        elif change == "weight":
            block.attn.proj.weight = nn.Parameter(2 * block.attn.proj.weight)
        elif change == "layer":
            block.attn.proj = OtherLayer(48, 48)
        elif change == "dropout":
            block.mlp.drop1.train()
        with (
            torch.autocast("cpu", BFLOAT16, enabled=change == "autocast"),
            torch.inference_mode(change != "gradients"),
            torch.set_grad_enabled(change == "gradients"),
        ):
            found = model(images)
    assert len(calls) == (0 if change in ("autocast", "gradients", "backend") else 5)
    assert len(seen) == (change == "hook")
    expected = copy.deepcopy(model)(images)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=5e-2 if change == "autocast" else 1e-4)


def test_exports_and_compilers_see_the_layers(calls):
    model, images = micro(depths=(1, 1), num_heads=(3, 6), shuffle_size=(2, 1)), golden_images(16).float()
    use_onednn(model)
    with inference(model):
        found = torch.jit.trace(model, images, check_trace=False)(images)
        compile_model(model)
        compiled = model(images)
    assert not calls
    torch.testing.assert_close(found, compiled, rtol=1e-4, atol=1e-4)


def test_a_library_that_computes_wrong_numbers_is_not_used(calls, monkeypatch, caplog):
    mlp = fused_block.FusedBlock.mlp
    monkeypatch.setattr(fused_block.FusedBlock, "mlp", lambda self, x, like: 1.01 * mlp(self, x, like))
    logger = logging.getLogger("msg_transformer")
    monkeypatch.setattr(logger, "propagate", True)
    model, images = micro(), golden_images(32).float()
    (found,) = computed(model, images)
    assert "fused_block.cpp is not used for 48 channels, because its numbers are wrong" in caplog.text
    torch.testing.assert_close(found, micro()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["built", "found", "no compiler", "no such compiler", "broken compiler", "no folder"]
)
def test_the_library_is_built_once_and_inference_works_without(monkeypatch, tmp_path, caplog, calls, case):
    home, build = tmp_path / "home", fused_block.load_library.__wrapped__
    monkeypatch.setenv("TORCH_HOME", str(home))
    if case == "found":
        build()
    elif case == "broken compiler":
        compiler = tmp_path / "compiler"
        compiler.write_text(
            '#!/bin/sh\nfor word; do case $word in *.so) echo broken > "$word";; esac; done\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
    elif case == "no compiler":
        monkeypatch.setenv("CXX", "/bin/false")
    elif case == "no such compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
    elif case == "no folder":
        home.write_text("")
    monkeypatch.setattr(fused_block, "load_library", functools.cache(build))
    monkeypatch.setattr(fused_block.logger, "propagate", True)
    images = golden_images(32).float()
    with caplog.at_level(logging.INFO, "msg_transformer"):
        (logits,) = computed(micro(), images)
    works = case in ("built", "found")
    assert bool(calls) == works
    assert ("built " in caplog.text) == (case == "built")
    assert caplog.text.count("cannot be used, so inference takes longer on this CPU") == (not works)
    assert not list(home.rglob("tmp*"))
    torch.testing.assert_close(logits, micro()(images), rtol=1e-4, atol=1e-4)
