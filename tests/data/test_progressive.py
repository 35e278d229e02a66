"""Progressive resizing (DATA.PROGRESSIVE): images of other sizes and augmentation in later epochs."""

import argparse
import signal
from functools import partialmethod

import numpy as np
import pytest
import timm
import torch
from helpers import (
    ROOT,
    Started,
    assert_same_weights,
    digits_config,
    logged,
    main_command,
    micro,
    run_folder,
    run_main,
    write_images,
)
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from config import ConfigError, dump_config, get_config, parse_config
from data import build_loaders
from data.loaders import build_reader
from data.progressive import Phase, build_phases
from distributed import Compute, seeded
from models import build_model, compile_model
from training.distillation import build_distillation
from utils import UserError

RAND = ["AUG.HFLIP", 0.5, "AUG.AUTO_AUGMENT", "rand-m10-n3-mstd0.5-inc1"]


def schedule(*phases):
    return ["DATA.PROGRESSIVE", list(phases)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 training images of each of three classes, 2 for validation, of 40 px."""
    folder = tmp_path_factory.mktemp("progressive")
    for split, number in (("train", 16), ("val", 2)):
        write_images(folder / split, number, size=40)
    return folder


def epochs_of(folder, epochs, *opts):
    """The batches of training epochs, and what the log said meanwhile."""
    config = digits_config(*opts, data_path=str(folder), batch_size=12)
    loader, sampler, *_ = build_loaders(config)
    with logged() as lines:
        found = []
        for epoch in epochs:
            sampler.start(epoch)
            found.append(torch.cat([images for images, _ in loader]))
    return found, lines


def augmented(transform, image, seeds=range(40)):
    """What a transform makes of an image under some seeds."""
    for seed in seeds:
        with seeded("test", seed):
            yield transform(image)


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_a_strength_multiplies_the_magnitude_of_randaugment_as_timm_defines_it(tmp_path, backend):
    """m10 at 0.3 gives the pixels of m3, and at 0.55 timm's operations run at 5.5."""
    path = str(tmp_path / "image.png")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)

    def results(policy, phase=None):
        config = digits_config(
            "DATA.IMG_SIZE", 48, "DATA.BACKEND", backend, "AUG.REPROB", 0, "AUG.AUTO_AUGMENT", policy
        )
        read, transform = build_reader(config, True, phase)
        return [torch.as_tensor(x) for x in augmented(transform, read(path))], transform

    weak, transform = results("rand-m10-mstd0.5-inc1", Phase(0, (48, 48), 0.3))
    assert all(map(torch.equal, weak, results("rand-m3-mstd0.5-inc1")[0]))
    assert not all(map(torch.equal, weak, results("rand-m10-mstd0.5-inc1")[0]))
    full = results("rand-m10-mstd0.5-inc1", Phase(0, (48, 48), 1.0))[0]
    assert all(map(torch.equal, full, results("rand-m10-mstd0.5-inc1")[0]))
    transform = results("rand-m10-mstd0.5-inc1", Phase(0, (48, 48), 0.55))[1]
    operations = next(step.ops for step in transform.transforms if hasattr(step, "ops"))
    timms = rand_augment_transform("rand-m10-mstd0.5-inc1").ops
    assert [op.name for op in operations] == [op.name for op in timms]
    assert {op.magnitude for op in operations} == {5.5} and {op.magnitude_std for op in operations} == {0.5}


def test_other_policies_do_not_change():
    for policy in ("3a", "v0", "augmix-m5", "none"):
        config = digits_config("DATA.IMG_SIZE", 48, "AUG.AUTO_AUGMENT", policy, *schedule([0, 48, 0.1]))
        (phase,) = build_phases(config)
        assert str(phase) == "images of 48 px, no RandAugment"
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
        plain, phased = (build_reader(config, True, choice)[1] for choice in (None, phase))
        assert all(map(torch.equal, augmented(plain, image), augmented(phased, image)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_an_epoch_has_the_images_that_a_run_of_its_size_alone_would_have(folder, backend, workers):
    opts = ["DATA.BACKEND", backend, *RAND]
    phases = schedule([0, 36, 0.3], [1, [40, 48], 0.5], [3, 64, 1])
    found, lines = epochs_of(folder, range(5), *opts, *phases, "DATA.NUM_WORKERS", workers)
    assert [tuple(images.shape[2:]) for images in found] == [(36, 36), (40, 48), (40, 48), (64, 64), (64, 64)]
    assert lines == [
        "epoch 0: images of 36 px, RandAugment at 0.3",
        "epoch 1: images of 40x48 px, RandAugment at 0.5",
        "epoch 3: images of 64 px, RandAugment at 1",
    ]
    expected = []
    for size, magnitude, epochs in ((36, 3, [0]), ([40, 48], 5, [1, 2]), (64, 10, [3, 4])):
        alone = [*RAND[:3], f"rand-m{magnitude}-n3-mstd0.5-inc1", "DATA.IMG_SIZE", size]
        expected += epochs_of(folder, epochs, "DATA.BACKEND", backend, *alone, "DATA.NUM_WORKERS", 0)[0]
    assert all(map(torch.equal, found, expected))


def test_workers_stay_the_same_when_the_size_changes(folder):
    opts = [*schedule([0, 36, 1], [1, 40, 1]), "DATA.NUM_WORKERS", 2]
    loader, sampler, val_loader, _ = build_loaders(digits_config(*opts, data_path=str(folder), batch_size=12))
    workers = []
    for epoch in range(2):
        sampler.start(epoch)
        assert len(list(loader)) == 4
        workers.append([worker.pid for worker in loader.loader._iterator._workers])
        assert all(images.shape[2:] == (32, 32) for images, _ in val_loader)
    assert workers[0] == workers[1]


def test_the_log_names_the_phase_in_which_a_resumed_run_goes_on(folder):
    _, lines = epochs_of(folder, [2, 3], *schedule([0, 36, 1], [1, 40, 1]), "DATA.NUM_WORKERS", 0)
    assert lines == ["epoch 2: images of 40 px, no RandAugment"]


@pytest.mark.parametrize(
    "phases, words",
    [
        ([[1, 16, 1.0]], "first epochs from 0 on"),
        ([[0, 16, 1.0], [0, 32, 1.0]], "each later than the one before"),
        ([[0, 16, 1.0], [2, 24, 1.0], [1, 32, 1.0]], "each later than the one before"),
        ([[0, 16]], "a list of [first epoch, size, strength]"),
        ([[0, 16, 1.0, 1]], "a list of [first epoch, size, strength]"),
        ([0, 16, 1.0], "a list of [first epoch, size, strength]"),
        ([[0, 16.5, 1.0]], "sizes, a whole number or [height, width]"),
        ([[0, [16, 16, 16], 1.0]], "sizes, a whole number or [height, width]"),
        ([[0, 0, 1.0]], "sizes, a whole number or [height, width], at least 1"),
        ([[0, 16, 1.5]], "strengths between 0 and 1"),
        ([[0, 16, -0.1]], "strengths between 0 and 1"),
        ([[0, 16, "weak"]], "strengths between 0 and 1"),
        ([[0, 16, 1.0], [20, 32, 1.0]], "a list whose first epochs are below TRAIN.EPOCHS, 20"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_with_its_key(phases, words):
    with pytest.raises(ConfigError) as error:
        digits_config(*schedule(*phases))
    message = str(error.value)
    assert message.startswith("--opts: DATA.PROGRESSIVE is ") and words in message
    assert len(message.splitlines()) == 1


def test_a_schedule_is_in_the_config_that_a_checkpoint_holds():
    config = digits_config(*schedule([0, 16, 0.3], [2, [24, 32], 1]))
    assert parse_config(dump_config(config), "x").DATA.PROGRESSIVE == [[0, 16, 0.3], [2, [24, 32], 1]]
    assert build_phases(digits_config()) == []


def test_detection_has_no_schedule():
    opts = ["DATA.PROGRESSIVE", "[[0, 64, 1]]"]
    problem = r"is \[\[0, 64, 1\]\], but must be empty for detection, see DET.MIN_SIZES$"
    with pytest.raises(ConfigError, match=problem):
        get_config(argparse.Namespace(cfg=str(ROOT / "configs/coco/shapes.yaml"), opts=opts))


def test_sizes_that_the_model_does_not_take_are_refused():
    with pytest.raises(UserError, match="images of 1x8 pixels are smaller than a patch of 2x2: raise the"):
        build_model(digits_config(*schedule([0, [1, 8], 1])))
    timms = ["MODEL.TYPE", "timm", "MODEL.DROP_PATH_RATE", 0, "DATA.IMG_SIZE", 64, "MODEL.TIMM_NAME"]
    fixed = [*timms, "vit_tiny_patch16_224"]
    with pytest.raises(UserError, match="vit_tiny_patch16_224 takes no images of 32x48 .*TIMM_ARGS"):
        build_model(digits_config(*fixed, *schedule([0, 64, 1], [1, [32, 48], 1])))
    for flexible in ([*fixed, "MODEL.TIMM_ARGS.dynamic_img_size", True], [*timms, "test_convnext"]):
        assert build_model(digits_config(*flexible, *schedule([0, [32, 48], 1], [1, 64, 1]))).training


def test_positions_are_resampled_and_learn_at_every_size():
    model = build_model(digits_config("MODEL.MSG.APE", True, *schedule([0, 13, 1], [1, [40, 24], 1])))
    for size in ((13, 13), (40, 24)):
        model.zero_grad()
        model(torch.randn(2, 3, *size)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
        assert model.absolute_pos_embed.grad.abs().max() > 0


def test_positions_have_no_deterministic_gradient_on_cuda():
    torch.use_deterministic_algorithms(True)
    try:
        opts = ["MODEL.MSG.APE", True, "DEVICE"]
        with pytest.raises(UserError, match="set MODEL.MSG.APE or DETERMINISTIC to False"):
            build_model(digits_config(*opts, "cuda", *schedule([0, 24, 1])))
        for device, side in (("cpu", 24), ("cuda", 32)):  # 32 px are not resampled
            build_model(digits_config(*opts, device, *schedule([0, side, 1])))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_teacher_takes_every_size_or_is_refused(tmp_path):
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    torch.save(teacher.state_dict(), tmp_path / "vit.pth")
    opts = ["DISTILL.TEACHER", "vit_tiny_patch16_224", "DISTILL.WEIGHTS", tmp_path / "vit.pth"]
    config = digits_config("MODEL.NUM_CLASSES", 3, *opts, *schedule([0, 24, 1], [1, 32, 1]))
    with pytest.raises(UserError, match=r"does not take images of 3 channels and 24x24 .*DATA.PROGRESSIVE"):
        build_distillation(config, ["a", "b", "c"], Compute(torch.device("cpu")))


def test_a_compiled_model_takes_more_sizes_than_pytorch_would_compile_by_itself(monkeypatch):
    compiled = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    model = micro(depths=(1,), num_heads=(3,), shuffle_size=(2,))
    images = [torch.randn(1, 3, 16, side) for side in (8, 16, 24, 32)]
    expected = [model(x) for x in images]
    with torch._dynamo.config.patch(recompile_limit=2):  # 8 by default
        compile_model(model)
        assert all(map(torch.equal, [model(x) for x in images], expected))


def command_of(folder, workers):
    command = ["--cfg", "configs/digits.yaml", "--data-path", folder, "--batch-size", 8, "--opts"]
    command += [*schedule([0, 16, 0.3], [1, [20, 24], 0.6]), *RAND, "AUG.MIXUP", 0.8, "MODEL.DROP_RATE", 0.1]
    command += ["TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0, "PRINT_FREQ", 1, "SAVE_FREQ", 1]
    command += ["MODEL.MSG.DEPTHS", [1, 1, 1]]
    return [*command, "DATA.NUM_WORKERS", workers]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The output of a run of two phases, one epoch each, that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    run_main("--output", output, *command_of(folder, 0))
    log = (run_folder(output) / "log_rank0.txt").read_text()
    assert "epoch 0: images of 16 px, RandAugment at 0.3" in log
    assert "epoch 1: images of 20x24 px, RandAugment at 0.6" in log
    return output


FIRST, LAST, CHANGED, SECOND = (f"[{place}/6]" for place in ("0/2][2", "0/2][5", "1/2][0", "1/2][2"))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "place, number, workers",
    [
        (FIRST, "SIGKILL", 0),
        slow(LAST, "SIGTERM", 2),
        (CHANGED, "SIGKILL", 2),
        (SECOND, "SIGTERM", 0),
        *(slow(place, "SIGKILL", workers) for place in (LAST, SECOND) for workers in (0, 2)),
        *(slow(place, "SIGTERM", workers) for place in (FIRST, CHANGED) for workers in (0, 2)),
    ],
)
def test_a_run_stopped_in_either_phase_or_at_the_change_ends_with_the_same_bits(
    tmp_path, folder, whole, place, number, workers
):
    command = ["--output", tmp_path, *command_of(folder, workers), "TRAIN.SAVE_STEPS", 2]
    stopped = Started(tmp_path, main_command(*command))
    stopped.wait_for(f"Train: {place}")
    stopped.process.send_signal(getattr(signal, number))
    assert stopped.wait() == (75 if number == "SIGTERM" else -signal.SIGKILL), stopped.text()
    assert "resuming from" in run_main(*command).stdout
    assert_same_weights(tmp_path, whole)
