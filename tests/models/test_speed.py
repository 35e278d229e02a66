"""What makes the model fast changes its numbers by rounding only, and never with stale weights."""

import copy
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial, partialmethod
from types import SimpleNamespace

import pytest
import torch
from helpers import micro
from timm.layers import Mlp
from torch import distributed, func, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models import compile_model, inference, use_onednn
from models.fast.choices import has_onednn
from models.fast.fixed_weights import Fixed
from models.fast.mlp import ROWS, _BlockedMlp

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="needs oneDNN on x86")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(24, 72), (72, 24)])
def test_onednn_linear_layers_equal_pytorchs_with_all_gradients(widths, bias):
    plain = nn.Linear(*widths, bias=bias)
    fast = nn.Sequential(copy.deepcopy(plain))
    use_onednn(fast)
    assert "forward" in vars(fast[0])
    x = torch.randn(3, 5, 11, widths[0], requires_grad=True)
    found, expected = (
        (y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters())))
        for layer, y in ((layer, layer(x)) for layer in (fast, plain))
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_gelu_is_applied_once_in_training_and_evaluation():
    plain = Mlp(8, 32)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    x = torch.randn(4, 8)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6)
    assert list(fast.state_dict()) == list(plain.state_dict())


@needs_onednn
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("rows", [5, ROWS + 7])
def test_training_an_mlp_by_blocks_gives_the_gradients_of_the_whole(rows, amp):
    torch.manual_seed(0)
    plain = Mlp(8, 24, 12)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    assert "forward" in vars(fast)
    x, grad = torch.randn(1, rows, 8, requires_grad=True), torch.randn(1, rows, 12)
    wanted, found, exact = [], [], []
    for mlp, dtype, results in ((plain, None, wanted), (fast, None, found), (plain, torch.float64, exact)):
        mlp = mlp.double() if dtype else mlp
        inputs = x.double() if dtype else x
        with torch.autocast("cpu", torch.bfloat16, enabled=amp and not dtype):
            out = mlp(inputs)
        results += [out, *torch.autograd.grad(out, (x, *mlp.parameters()), grad.to(out.dtype))]
    for a, b, c in zip(found, wanted, exact):
        assert a.shape == b.shape and a.dtype == b.dtype
        errors = [((y.double() - c).norm() / c.norm()).item() for y in (a, b)]
        assert errors[0] < 1.5 * errors[1] + 1e-6, errors  # no worse than PyTorch's own


@pytest.mark.parametrize("size", [32, 36])
def test_hessians_times_vectors_in_input_and_weights_are_those_of_the_formula(size):
    """With all that is fast, at a size of whole regions and another."""
    fast, plain = micro(), micro(attention="eager").double()
    use_onednn(fast)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    products = []
    for model, images in ((fast, x), (plain, x.double())):
        inputs = [images.requires_grad_(), *model.parameters()]
        first = torch.autograd.grad(model(images).logsumexp(1).sum(), inputs, create_graph=True)
        inner = sum((gradient * tensor.detach()).sum() for gradient, tensor in zip(first, inputs))
        products.append(torch.autograd.grad(inner, inputs))
    for a, b in zip(*products):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own, for dual numbers
@pytest.mark.parametrize("size", [32, 36])
def test_transforms_of_torch_func_see_the_formula(size):
    fast, plain = micro(depths=(1, 1, 1)), micro(depths=(1, 1, 1), attention="eager").double()
    use_onednn(fast)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))

    def loss(weights, image, model=fast):
        return func.functional_call(model, weights, (image[None],)).logsumexp(1).sum()

    weights = [{name: p.detach() for name, p in model.named_parameters()} for model in (fast, plain)]
    of_loss = partial(loss, weights[0])
    exact = x.double().requires_grad_()
    (gradients,) = torch.autograd.grad(plain(exact).logsumexp(1).sum(), exact, create_graph=True)
    (hessian,) = torch.autograd.grad((gradients * x).sum(), exact)
    gradients = gradients.detach()
    directional = (gradients * x)[0].sum()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(of_loss(forward_ad.make_dual(x[0], x[0]))).tangent
    found = {
        "vmap of grad": (func.vmap(func.grad(of_loss))(x), gradients),
        "jacrev": (func.jacrev(of_loss)(x[0]), gradients[0]),
        "jvp": (func.jvp(of_loss, (x[0],), (x[0],))[1], directional),
        "jvp of grad": (func.jvp(func.grad(of_loss), (x[0],), (x[0],))[1], hessian[0]),
        "dual numbers": (dual, directional),
        "stacked gradients": (jacobian(lambda x: fast(x).logsumexp(1), x, vectorize=True).sum(0), gradients),
    }
    for what, (result, expected) in found.items():
        assert (result - expected).norm() < 1e-4 * expected.norm(), what
    per_image = func.vmap(func.grad(loss), (None, 0))(weights[0], x)
    for i in range(2):
        expected = func.grad(loss)(weights[1], x[i].double(), plain)
        for name, gradient in per_image.items():
            assert (gradient[i] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


def test_gradients_of_gradients_of_an_mlp_by_blocks():
    shapes = (5, 3), (4, 3), (4,), (2, 4), (2,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(_BlockedMlp.apply, inputs)
    assert torch.autograd.gradgradcheck(_BlockedMlp.apply, inputs)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_changed_between_two_evaluations_are_seen(dtype):
    """Behind torch's back, too: nothing is kept outside the context."""
    fast, plain = micro(), micro()
    use_onednn(fast)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def logits(model):
        with inference(model, dtype), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(images).float()

    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.1, atol=0.1)
    before = logits(fast)
    torch.testing.assert_close(before, logits(plain), **tolerance)
    for model in (fast, plain):
        model.layers[0].blocks[0].attn.rel_pos_msg.data.mul_(-3)
        model.layers[1].blocks[1].mlp.fc1.weight.data.mul_(-1)
    torch.testing.assert_close(logits(fast), logits(plain), **tolerance)
    assert (logits(fast) - before).abs().max() > 5 * tolerance["atol"]
    assert not any(kept_of(fast))


@needs_onednn
def test_inference_packs_weights_and_bias_and_changes_no_state():
    model = micro()
    use_onednn(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with inference(model):
        block = model.layers[0].blocks[0]
        assert block.mlp.fc1.fixed.kept[0][0].is_mkldnn and block.attn.fixed.kept[0].shape == (3, 17, 17)
        assert torch.is_inference_mode_enabled() and not model.training
        assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def kept_of(model):
    """What modules keep while weights are fixed."""
    return [module.fixed.kept for module in model.modules() if hasattr(module, "fixed")]


@pytest.mark.parametrize("training", [True, False])
def test_inference_leaves_every_module_in_the_mode_that_it_had(training):
    model = micro().train(training)
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with inference(model):
        with inference(model):
            assert not any(module.training for module in model.modules())
        assert all(kept_of(model)) and not any(module.training for module in model.modules())
        model.train()
    assert [module.training for module in model.modules()] == before and not any(kept_of(model))


def test_threads_share_a_model_in_inference():
    """One leaves while others compute, and none sees training mode or half of what was fixed."""
    model, images = micro(depths=(1, 1, 1), proj_drop_rate=0.5).train(), torch.randn(1, 3, 36, 36)
    use_onednn(model)
    with inference(model):
        expected = model(images)

    def answers(_):
        with inference(model):
            return [model(images), model(images)]

    with ThreadPoolExecutor(4) as pool:
        for answer in itertools.chain(*pool.map(answers, range(20))):
            torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)
    assert model.training and not any(kept_of(model))


def test_one_of_two_contexts_that_overlap_ends_without_the_other():
    model, entered, end = micro().train(), threading.Event(), threading.Event()

    def other():
        with inference(model.layers[0]):
            entered.set()
            end.wait(60)

    with ThreadPoolExecutor(1) as pool:
        with inference(model):
            future = pool.submit(other)
            entered.wait(60)
        try:
            assert all(kept_of(model.layers[0])) and not any(kept_of(model.layers[1]))
            assert not model.layers[0].training and model.layers[1].training
        finally:
            end.set()
        future.result()
    assert not any(kept_of(model)) and all(module.training for module in model.modules())


def test_copies_made_in_inference_are_not_fixed():
    model, images = micro(depths=(1, 1, 1)), torch.randn(1, 3, 32, 32)
    use_onednn(model)
    with inference(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        expected = model(images)
    for twin in copies:
        assert not any(kept_of(twin))
        with torch.inference_mode():  # in which the first of them was made
            torch.testing.assert_close(twin(images), expected)
            twin.layers[0].blocks[0].attn.rel_pos_msg.mul_(-3)
            assert not torch.allclose(twin(images), expected)


def test_what_was_fixed_does_not_move_to_another_device_with_its_weights():
    fixed, weight = Fixed(), SimpleNamespace(device="cpu")
    fixed.keep("bias", weight)
    with torch.no_grad():
        assert fixed.of(weight) == "bias"
        weight.device = "cuda"
        assert fixed.of(weight) is None


def test_other_parameters_count_in_inference():
    """Those of torch.func.functional_call, and new ones in place of what was fixed."""
    model, other, images = micro(depths=(1, 1, 1)), micro(depths=(1, 1, 1)), torch.randn(1, 3, 32, 32)
    use_onednn(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
        expected = other(images)
    with inference(model):
        before = model(images)
        for weights in (dict(other.named_parameters()), other.state_dict()):
            found = func.functional_call(model, weights, (images,))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)
        model.layers[0].blocks[0].attn.rel_pos_msg = other.layers[0].blocks[0].attn.rel_pos_msg
        assert not torch.allclose(model(images), before)


def test_a_gradient_that_is_wanted_inside_inference_is_whole():
    model, images = micro(), torch.randn(1, 3, 32, 32, requires_grad=True)
    use_onednn(model)
    wanted = torch.autograd.grad(model(images).sum(), (images, model.layers[0].blocks[0].attn.rel_pos_msg))
    with inference(model), torch.inference_mode(False):
        inputs = images, model.layers[0].blocks[0].attn.rel_pos_msg
        torch.testing.assert_close(torch.autograd.grad(model(images).sum(), inputs), wanted)


@pytest.mark.parametrize("size", [32, 36])
def test_offloaded_weights_come_and_go_in_inference(size):
    """They are on the meta device except in the forward of their module."""
    model, images = micro(), torch.randn(1, 3, size, size)
    use_onednn(model)
    with torch.no_grad():
        expected = model(images)

    def move(module, weights):
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight))

    for module in list(model.modules()):
        own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
        if own and module is not model:
            away = {name: weight.to("meta") for name, weight in own.items()}
            move(module, away)
            module.register_forward_pre_hook(lambda module, _, own=own: move(module, own))
            module.register_forward_hook(lambda module, *_, away=away: move(module, away))
    with inference(model):
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_sharded_weights_are_gathered_in_inference(tmp_path):
    model, batches = micro(depths=(1, 1, 1)), [torch.randn(1, 3, size, size) for size in (32, 36)]
    use_onednn(model)
    with torch.no_grad():
        expected = [model(images) for images in batches]
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for stage in model.layers:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with inference(model):
            found = [model(images) for images in batches]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        sum(model(images).sum() for images in batches).backward()
    finally:
        distributed.destroy_process_group()


def test_the_head_gets_the_messenger_of_the_full_computation():
    model = micro().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tokens = model.forward_features(images)
    patches, messengers = model.forward_stages(images, only_messengers=True)[-1]
    assert tokens.shape == (2, 17, 192) and patches is None and messengers.shape == (2, 1, 1, 192)
    torch.testing.assert_close(model(images), model.forward_head(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiling_takes_one_graph_for_training_and_one_for_each_batch_size_of_evaluation():
    """Three epochs compile nothing after the first, and give the numbers of the uncompiled model."""
    torch._dynamo.reset()
    counters.clear()
    compiled, plain = micro(), micro()
    for model in (compiled, plain):
        use_onednn(model)
    compiled.compile(fullgraph=True, dynamic=False)
    images, graphs = torch.randn(4, 3, 32, 32), []
    for _ in range(3):
        results = []
        for model in (compiled, plain):
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            for _ in range(2):
                loss = model(images).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with inference(model):
                results.append([loss, model(images), model(images[:3])])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [3, 3, 3]
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_compiled_model_takes_more_sizes_than_pytorch_would_compile_by_itself(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    model = micro(depths=(1,), num_heads=(3,), shuffle_size=(2,))
    images = [torch.randn(1, 3, 16, side) for side in (8, 16, 24, 32)]
    expected = [model(x) for x in images]
    with torch._dynamo.config.patch(recompile_limit=2):  # 8 by default
        compile_model(model)
        assert all(map(torch.equal, [model(x) for x in images], expected))
