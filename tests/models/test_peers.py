"""Models of timm, trained by the same loop so that they can be compared with."""

import pytest
import timm
import torch
from helpers import digits_config, run_main
from torch.nn.functional import cross_entropy

from models import build_model, count_macs
from utils import UserError

SIZES = dict(patch_size=2, window_size=4, embed_dim=48, depths=[2, 2, 2], num_heads=[3, 6, 12])
SWIN = ["MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "swin_tiny_patch4_window7_224"]
SWIN += [word for name, value in SIZES.items() for word in (f"MODEL.TIMM_ARGS.{name}", value)]
VIT = ["MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "test_vit"]


def test_a_model_of_timm_is_the_one_that_timm_builds():
    model = build_model(digits_config(*SWIN, "MODEL.DROP_PATH_RATE", 0.3)).eval()
    assert model.layers[2].blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    timms = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **SIZES).eval()
    timms.load_state_dict(model.state_dict())
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    gradients = []
    for peer in (model, timms):
        logits = peer(images)
        cross_entropy(logits, targets).backward()
        gradients.append([logits, *(p.grad for p in peer.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_macs_of_other_models_are_counted():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 2, stride=2), torch.nn.Flatten(), torch.nn.Linear(64, 5)
    )
    assert count_macs(model, (1, 8, 8)) == 16 * 4 * 4 + 64 * 5


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.TYPE", "timm"], ["MODEL.TIMM_NAME", "MODEL.TYPE is timm"]),
        (["MODEL.TIMM_NAME", "resnet18"], ["MODEL.TIMM_NAME", "MODEL.TYPE is timm"]),
        (["MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "resnet81"], ["resnet81", "did you mean"]),
        ([*VIT, "MODEL.TIMM_ARGS.embed_dimm", 3], ["test_vit", "embed_dimm", "MODEL.TIMM_ARGS"]),
        ([*VIT, "MODEL.TIMM_ARGS.img_size", 3], ["img_size has a key of its own"]),
        ([*VIT, "MODEL.TIMM_ARGS.a.b", 3], ["unknown key MODEL.TIMM_ARGS.a.b"]),
        ([*VIT, "MODEL.TIMM_ARGS.A-b", 3], ["MODEL.TIMM_ARGS.A-b"]),
        (["MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "dla46_c"], ["drop_path_rate", "MODEL.DROP_PATH_RATE 0"]),
        ([*VIT, "DATA.DATASET", "coco"], ["MODEL.TYPE", "detection"]),
    ],
)
def test_what_timm_cannot_build_is_one_clear_message(opts, words):
    with pytest.raises(UserError) as error:
        build_model(digits_config(*opts))
    assert all(word in str(error.value) for word in words), error.value


def test_a_network_that_drops_no_paths_and_is_told_no_size_is_built():
    config = digits_config("MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "dla46_c", "MODEL.DROP_PATH_RATE", 0)
    assert build_model(config).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_a_model_of_timm_is_trained_and_refuses_other_weights(data, tmp_path):
    words = "--cfg configs/digits.yaml --batch-size 4 --opts DATA.NUM_WORKERS 0 TRAIN.WARMUP_EPOCHS 0"
    arguments = ["--output", tmp_path, "--data-path", data, *words.split(), "TRAIN.EPOCHS", 1]
    run_main(*arguments, *VIT)
    told = run_main("--eval", *arguments, *VIT, "MODEL.TIMM_NAME", "test_vit2", check=False)
    assert told.returncode and "MODEL.TIMM_NAME is 'test_vit' in the checkpoint" in told.stderr
