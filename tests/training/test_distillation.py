"""Distillation against its formulas, and runs that learn from a teacher."""

import shutil

import pytest
import timm
import torch
from helpers import assert_same_weights, digits_config, micro, run_folder, run_main
from torch import nn

import checkpoint as ckpt
from data.transforms import normalization
from distributed import Compute
from training.distillation import Distillation, build_distillation, distillation_loss
from utils import UserError

CLASSES = ["a", "b", "c"]
CPU = Compute(torch.device("cpu"))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_hintons(temperature):
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0
    for s, t in zip(student, teacher):
        p, q = torch.exp(t / temperature), torch.exp(s / temperature)
        p, q = p / p.sum(), q / q.sum()
        expected += temperature**2 * (p * (p.log() - q.log())).sum() / len(student)
    torch.testing.assert_close(distillation_loss(student, teacher, "soft", temperature), expected)


def test_hard_loss_is_the_cross_entropy_with_the_teachers_class():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = -sum(s.log_softmax(0)[t.argmax()] for s, t in zip(student, teacher)) / len(student)
    torch.testing.assert_close(distillation_loss(student, teacher, "hard", 2.0), expected)


def test_the_parts_are_weighted_and_the_teacher_sees_its_own_normalisation_without_gradients():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.1, 0.3]).double()
    rescale = [(std / 0.5)[:, None, None], ((mean - 0.5) / 0.5)[:, None, None]]
    settings = digits_config("DISTILL.ALPHA", 0.25, "DISTILL.TEMPERATURE", 2.0).DISTILL
    distil = Distillation(teacher, rescale, settings, CPU)
    pixels, logits = torch.rand(4, 3, 2, 2).double(), torch.randn(4, 3).double().requires_grad_()
    parts = distil((pixels - mean[:, None, None]) / std[:, None, None], logits, torch.tensor(2.0))
    expected = 0.25 * distillation_loss(logits.float(), teacher((pixels - 0.5) / 0.5).float(), "soft", 2.0)
    torch.testing.assert_close(parts, dict(labels=torch.tensor(1.5), teacher=expected), check_dtype=False)
    sum(parts.values()).backward()
    assert logits.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())
    assert not teacher.training


def test_a_teacher_of_timm_keeps_its_weights_and_its_normalisation(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    opts = ["MODEL.NUM_CLASSES", 3, "DISTILL.TEACHER", "test_vit", "DISTILL.WEIGHTS", tmp_path / "vit.pth"]
    distil = build_distillation(digits_config(*opts), CLASSES, CPU)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in normalization(3))
    with torch.no_grad():
        expected = model((pixels - 0.5) / 0.5)
        found = distil.teacher((pixels - mean) / std * distil.factor + distil.offset)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def save(path, classes, **sizes):
    model = micro(num_classes=len(classes), **sizes)
    text = digits_config("MODEL.NUM_CLASSES", len(classes)).dump()
    torch.save(dict(model=model.state_dict(), classes=classes, config=text), path)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["DISTILL.TEACHER", "{}/none.pth"], ["none.pth", "no such checkpoint"]),
        (["DISTILL.TEACHER", "{}/other.pth"], ["other classes", "a, b, d ... there"]),
        (["DISTILL.TEACHER", "{}/ours.pth", "DISTILL.WEIGHTS", "x"], ["DISTILL.WEIGHTS", "models of timm"]),
        (["DISTILL.TEACHER", "test_vit"], ["DISTILL.WEIGHTS is empty"]),
        (
            ["DISTILL.TEACHER", "test_vit", "DISTILL.WEIGHTS", "pretrained"],
            ["1000 classes", "the data have 3"],
        ),
        (["DISTILL.TEACHER", "test_vit", "DISTILL.WEIGHTS", "{}/ours.pth"], ["ours.pth does not fit"]),
        (["DISTILL.TEACHER", "{}/ours.pth", "MODEL.MSG.IN_CHANS", 1], ["1 channels", "DATA.IMG_SIZE"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_clear_message(tmp_path, opts, words):
    save(tmp_path / "ours.pth", CLASSES)
    save(tmp_path / "other.pth", ["a", "b", "d"])
    opts = [word.format(tmp_path) if isinstance(word, str) else word for word in opts]
    with pytest.raises(UserError) as error:
        build_distillation(digits_config("MODEL.NUM_CLASSES", 3, *opts), CLASSES, CPU)
    assert all(word in str(error.value) for word in words), error.value


def test_a_run_learns_from_a_teacher_and_goes_on_with_the_same_bits(data, tmp_path):
    save(tmp_path / "teacher.pth", CLASSES)
    words = "--cfg configs/digits.yaml --batch-size 4 --opts DATA.NUM_WORKERS 0 TRAIN.WARMUP_EPOCHS 0"
    arguments = ["--data-path", data, *words.split(), "TRAIN.EPOCHS", 2, "AUG.MIXUP", 0.8]
    arguments += ["DISTILL.TEACHER", tmp_path / "teacher.pth", "DISTILL.ALPHA", 0.9]
    run_main("--output", tmp_path / "whole", *arguments)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (run_folder(tmp_path / "again") / "ckpt_epoch_1.pth").unlink()
    run_main("--output", tmp_path / "again", *arguments)
    assert_same_weights(tmp_path / "again", tmp_path / "whole")
    log = (run_folder(tmp_path / "whole") / "log_rank0.txt").read_text()
    assert "distillation (soft, 0.9 of the loss)" in log and "labels " in log and "teacher " in log
    saved = ckpt.read_checkpoint(str(run_folder(tmp_path / "whole") / "ckpt_epoch_1.pth"))
    assert not any("teacher" in name for name in saved["model"])
