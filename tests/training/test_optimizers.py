"""Optimizers by name: timm's numbers, the official groups, exact resuming; apex where it is installed."""

import fnmatch
import sys
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
from helpers import digits_config, logged, micro, new_run, restore
from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

import checkpoint as ckpt
import optimizer as optimizers
from config import OPTIMIZERS, ConfigError
from data.samplers import TrainBatchSampler
from lr_scheduler import build_scheduler
from models import build_model, choose_layer_norm
from models.fast import apex
from models.msg_transformer import MSGTransformer
from optimizer import build_optimizer, parameter_groups
from training.engine import learning_rate
from utils import UserError


class Small(nn.Module):
    """A few parameters of every kind: a convolution, matrices, norms, a table that is not decayed."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv2d(3, 20, 3), nn.Linear(20, 24), nn.LayerNorm(24)
        self.table = nn.Parameter(torch.randn(1, 5, 24))

    def no_weight_decay(self):
        return {"table"}


def config_for(name, *opts):
    return digits_config(
        "TRAIN.OPTIMIZER.NAME", name, "TRAIN.BASE_LR", 0.01, "TRAIN.WEIGHT_DECAY", 0.3, *opts
    )


def small():
    torch.manual_seed(0)
    return Small()


def update(model, optimizer, seeds):
    """An optimizer step for each seed, with gradients of that seed."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "muon", "nadamw"])
def test_updates_are_those_of_timms_factory_over_the_official_groups(name):
    """timm groups the parameters itself here; muon leaves to AdamW what is not decayed, as it can in timm."""
    ours, theirs, before = small(), small(), small()
    settings = dict(betas=(0.8, 0.9), eps=1e-3) if name == "adamw" else dict(momentum=0.7)
    settings |= dict(lr=0.01, weight_decay=0.3, fallback_no_weight_decay=name == "muon")
    expected = create_optimizer_v2(theirs, name, **settings)
    opts = ["BETAS", "(0.8, 0.9)", "EPS", 1e-3] if name == "adamw" else ["MOMENTUM", 0.7]
    opts[::2] = [f"TRAIN.OPTIMIZER.{key}" for key in opts[::2]]
    optimizer = build_optimizer(config_for(name, *opts), ours, 1.0)
    for group, official, decay in zip(optimizer.param_groups, parameter_groups(ours), (0.3, 0.0)):
        assert list(map(id, group["params"])) == list(map(id, official["params"]))
        assert (group["weight_decay"], group["lr"]) == (decay, 0.01)
    found = update(ours, optimizer, range(3))
    for x, y, start in zip(found, update(theirs, expected, range(3)), before.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert (x - start).abs().max() > 1e-4


def test_settings_are_the_optimizers_own_until_they_are_changed():
    lion, changed = (build_optimizer(config_for("lion", *opts), small(), 1.0) for opts in (
        [], ["TRAIN.OPTIMIZER.BETAS", "(0.8, 0.9)"],
    ))  # fmt: skip
    assert lion.defaults["betas"] == (0.9, 0.99) and changed.defaults["betas"] == (0.8, 0.9)
    assert build_optimizer(config_for("lamb"), small(), 1.0).defaults["eps"] == 1e-6
    muon = build_optimizer(config_for("muon", "TRAIN.OPTIMIZER.MOMENTUM", 0.7), small(), 1.0)
    assert muon.defaults["momentum"] == 0.7
    with pytest.raises(UserError, match="BETAS: adan takes 3 of them"):
        build_optimizer(config_for("adan", "TRAIN.OPTIMIZER.BETAS", "(0.8, 0.9)"), small(), 1.0)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in optimizers.APEX])
def test_every_optimizer_goes_on_after_a_checkpoint_with_the_same_bits(name, tmp_path):
    """A file of two updates; the third is made after reading it, and without."""
    path, model, other = str(tmp_path / "c.pth"), small(), small()
    optimizer, fresh = (build_optimizer(config_for(name), each, 1.0) for each in (model, other))
    update(model, optimizer, range(2))
    content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=0, score=1.0)
    if name not in ("adamw", "sgd"):
        content["optimizer_name"] = optimizer.name
    torch.save(content, path)
    run = ckpt.read_run(path)
    other.load_state_dict(run["model"])
    ckpt.load_optimizer(fresh, other, run, path)
    for x, y in zip(update(model, optimizer, range(2, 4)), update(other, fresh, range(2, 4))):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layer_wise_rates_are_those_of_timm(name):
    model = micro(ape=True)
    optimizer = build_optimizer(config_for(name, "TRAIN.LAYER_DECAY", 0.7), model, 1.0)
    timms = create_optimizer_v2(model, name, lr=0.01, weight_decay=0.3, layer_decay=0.7)
    keys = ("lr_scale", "weight_decay")
    expected = {id(p): [group[key] for key in keys] for group in timms.param_groups for p in group["params"]}
    found = {id(p): [group[key] for key in keys] for group in optimizer.param_groups for p in group["params"]}
    assert found == expected and len(found) == len(list(model.parameters()))
    decayed = {id(p) for p in parameter_groups(model)[0]["params"]}
    assert {key for key, (_, decay) in found.items() if decay} == decayed
    fallback = {
        id(p) for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]
    }
    named = {id(p) for key, p in model.named_parameters() if key in model.no_weight_decay()}
    assert fallback == (named if name == "muon" else set())
    scheduler = build_scheduler(config_for(name), optimizer, 10, 1.0)
    scheduler.step_update(0)
    last = optimizer.param_groups[-1]["lr"] / optimizer.param_groups[-1]["lr_scale"]
    assert learning_rate(SimpleNamespace(updater=SimpleNamespace(optimizer=optimizer))) == pytest.approx(last)


def scales_by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def test_layers_are_those_of_timms_swin():
    """Swin merges at the start of a stage, and this model at the end of the one before."""
    sizes = dict(embed_dim=16, depths=(2, 2, 6, 2), num_heads=(1, 1, 2, 2))
    model, swin = MSGTransformer(**sizes), timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    expected = scales_by_name(swin, param_groups_layer_decay(swin, layer_decay=0.75))
    config = config_for("adamw", "TRAIN.LAYER_DECAY", 0.75)
    found = scales_by_name(model, build_optimizer(config, model, 1.0).param_groups)
    for stage in (2, 1, 0):
        for kind in ("reduction.weight", "norm.weight", "norm.bias"):
            found[f"layers.{stage + 1}.downsample.{kind}"] = found.pop(f"layers.{stage}.downsample.{kind}")
    both = found.keys() & expected.keys()
    assert {name: found[name] for name in both} == {name: expected[name] for name in both}
    assert len(both) == len(expected) - 2 and expected["head.fc.weight"] == found["head.weight"] == 1
    assert found["msg_tokens"] == found["patch_embed.proj.weight"] == pytest.approx(0.0238, abs=5e-5)


def test_patterns_in_what_timms_models_do_not_decay_are_read():
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=2)
    assert "pos_embed.*" in model.no_weight_decay()
    spared, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    found = [set(map(id, group["params"])) for group in parameter_groups(model)]
    assert found == [set(map(id, group["params"])) for group in (decayed, spared)]


def run_with(name, folder, *opts):
    return restore(new_run(folder, micro(), TrainBatchSampler(8, 4, 1, 0, 1, 0), config_for(name, *opts)))


def trained(run, seed):
    """An update of the run on images of a seed, which ends the epoch; returns the weights."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with run.updater.micro_batch(0):
        run.updater.backward(run.model(images).logsumexp(1).sum())
    run.updater.update()
    run.end_epoch(dict(train_loss=1.0), dict(acc1=50.0))
    return run.model.state_dict()


@pytest.mark.parametrize(
    "name, opts, others",
    [
        ("lamb", [], [("lion", [], "another TRAIN.OPTIMIZER.NAME: lamb there, lion here")]),
        ("adamw", [], [("sgd", [], "another TRAIN.OPTIMIZER.NAME: adamw there, sgd here")]),
        ("sgd", [], [("adamw", [], "another TRAIN.OPTIMIZER.NAME: sgd there, adamw here")]),
        (
            "adamw",
            ["TRAIN.LAYER_DECAY", 0.7],
            [
                ("adamw", [], "TRAIN.LAYER_DECAY on in one of them alone"),
                ("lion", [], "another TRAIN.OPTIMIZER.NAME: adamw there, lion here"),
            ],
        ),
    ],
)
def test_a_run_resumes_with_the_state_of_its_optimizer_and_no_other(name, opts, others, tmp_path):
    run = run_with(name, tmp_path, *opts)
    trained(run, 1)
    again = run_with(name, tmp_path, *opts)
    run.start_epoch(1)
    again.start_epoch(1)
    expected, found = trained(run, 2), trained(again, 2)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    for other, their_opts, words in others:
        with pytest.raises(ckpt.CheckpointError, match=words):
            run_with(other, tmp_path, *their_opts)


def test_layer_wise_rates_are_refused_where_there_are_no_layers():
    with pytest.raises(UserError, match="no group_matcher"):
        build_optimizer(config_for("adamw", "TRAIN.LAYER_DECAY", 0.7), small(), 1.0)


@pytest.mark.parametrize(
    "name, near", [("lyon", "lion"), ("adamW", "adamw"), ("fusedadam", "fused_adam"), ("adafactor", "adamc")]
)
def test_an_unknown_name_and_one_that_could_not_resume_exactly_are_one_message_with_close_names(name, near):
    words = f"OPTIMIZER.NAME is '{name}', but must be an optimizer of timm that a run can resume with"
    with pytest.raises(ConfigError, match=f"{words}, such as .*'{near}'"):
        config_for(name)


class Stand(torch.optim.Optimizer):
    """Takes what apex's optimizers take, and counts updates in its groups as they do."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def zero_grad(self):
        pass


class WithoutKernels(Stand):
    def __init__(self, *arguments, **settings):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")


class StandNorm(nn.LayerNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps, elementwise_affine)


def install(monkeypatch, **modules):
    """Put a package called apex with such modules in place of any that is installed."""
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    for name, content in modules.items():
        module = ModuleType(f"apex.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"apex.{name}", module)


@pytest.fixture
def on_gpu(monkeypatch):
    """Look for apex as on a machine with a GPU."""
    find = apex.find_apex
    monkeypatch.setattr(optimizers, "find_apex", lambda path, on_gpu: find(path, True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def built(name):
    with logged() as lines:
        return build_optimizer(config_for(name, "TRAIN.OPTIMIZER.EPS", 1e-7), small(), 2.0), " ".join(lines)


@pytest.mark.parametrize("name, kind", [("fused_adam", "FusedAdam"), ("fused_lamb", "FusedLAMB")])
def test_apex_gets_the_groups_and_settings_as_in_swin(name, kind, monkeypatch, on_gpu):
    install(monkeypatch, optimizers={kind: Stand})
    optimizer, told = built(name)
    assert type(optimizer) is Stand and told == f"{name}: apex's {kind}"
    assert optimizer.defaults == dict(lr=0.02, betas=(0.9, 0.999), eps=1e-7, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("name, kind", [("fused_adam", "AdamW"), ("fused_lamb", "Lamb")])
@pytest.mark.parametrize("why", ["is not installed", "without its CUDA kernels", "for CUDA GPUs"])
def test_without_apex_its_optimizers_have_stand_ins_and_the_log_says_why(
    name, kind, why, monkeypatch, request
):
    if why != "for CUDA GPUs":
        request.getfixturevalue("on_gpu")
    without = dict(FusedAdam=WithoutKernels, FusedLAMB=WithoutKernels)
    # The package of that name on PyPI has no such modules.
    install(monkeypatch, **(dict(optimizers=without) if why == "without its CUDA kernels" else {}))
    optimizer, told = built(name)
    assert type(optimizer).__name__ == kind and optimizer.defaults["eps"] == 1e-7
    assert told.startswith(f"{name}: ") and why in told


def test_norms_are_apexs_where_it_is_installed(monkeypatch, on_gpu):
    wanted = digits_config("AMP.FUSED_LAYERNORM", True)
    install(monkeypatch)
    assert choose_layer_norm(wanted)[0] is nn.LayerNorm and "not installed" in choose_layer_norm(wanted)[1]
    install(monkeypatch, normalization=dict(FusedLayerNorm=StandNorm))
    model, plain = build_model(wanted), build_model(digits_config())
    assert choose_layer_norm(wanted)[1] == "AMP.FUSED_LAYERNORM: apex's FusedLayerNorm"
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert {type(norm) for norm in norms} == {StandNorm} and len(norms) == 16
    assert model.state_dict().keys() == plain.state_dict().keys() and model.flops() == plain.flops()
    on_cpu = digits_config("AMP.FUSED_LAYERNORM", True, device="cpu")
    assert choose_layer_norm(on_cpu) == (
        nn.LayerNorm, "AMP.FUSED_LAYERNORM: PyTorch's LayerNorm, because apex is for CUDA GPUs"
    )  # fmt: skip
    assert choose_layer_norm(digits_config()) == (nn.LayerNorm, "")


def test_the_config_knows_the_names_of_all_optimizers():
    """Others need second derivatives, keep what no checkpoint holds, or are of apex or bitsandbytes."""
    others = ("adahessian", "*adafactor*", "kron*", "fused*", "bnb*")
    names = [name for name in list_optimizers() if not any(fnmatch.fnmatch(name, other) for other in others)]
    assert sorted([*names, *optimizers.APEX]) == OPTIMIZERS
