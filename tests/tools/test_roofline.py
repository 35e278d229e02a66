"""Operations and bytes against numbers counted by hand."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.fast.attention import windowed_attention
from tools.roofline import Work, count_work, least_seconds


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(3, 50, 50, device="meta", dtype=torch.bfloat16))

    def forward(self, qkv):
        return windowed_attention(qkv, self.bias, 0.2)


def test_inference_reads_and_writes_once():
    layer = nn.Linear(96, 384, device="meta", dtype=torch.bfloat16)
    x = torch.empty(2, 50, 96, device="meta", dtype=torch.bfloat16)
    moved = 2 * (100 * 96 + 96 * 384 + 384 + 100 * 384)
    assert count_work(layer, x) == [Work(2 * 100 * 96 * 384, moved)]


def test_training_counts_gradients_and_the_update():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False)).to("meta")
    work = count_work(model, torch.empty(10, 8, device="meta"), training=True)
    first, second = 4 * (10 * 8 + 8 * 16 + 16 + 10 * 16), 4 * (10 * 16 + 16 * 4 + 10 * 4)
    first_learns, second_learns = 4 * (8 * 16 + 16), 4 * (10 * 16 + 16 * 4)  # images need no gradient
    assert work == [
        Work(2 * 10 * 8 * 16, first),
        Work(2 * 10 * 16 * 4, second),
        Work(2 * 10 * 8 * 16, first + first_learns),
        Work(4 * 10 * 16 * 4, second + second_learns),
        Work(0, 28 * (8 * 16 + 16 + 16 * 4)),
    ]


def test_attention_is_one_operation_without_its_scores():
    qkv = torch.empty(64, 50, 288, device="meta", dtype=torch.bfloat16)
    moved = 2 * (64 * 50 * 288 + 3 * 50 * 50 + 64 * 50 * 96)
    assert count_work(Attention(), qkv) == [Work(4 * 64 * 50 * 50 * 96, moved)]


def test_an_operand_that_is_used_twice_is_read_once():
    gram = nn.Identity()
    gram.forward = lambda x: x @ x.mT
    assert count_work(gram, torch.empty(5, 4, device="meta")) == [Work(2 * 5 * 5 * 4, 4 * (5 * 4 + 5 * 5))]


def test_all_tensors_of_a_function_count():
    """An LSTM takes lists of weights and returns its states too."""
    lstm, x = nn.LSTM(4, 3, batch_first=True).to("meta"), torch.empty(2, 5, 4, device="meta")
    weights, states = 12 * 4 + 12 * 3 + 12 + 12, 2 * 2 * (2 * 3)
    assert count_work(lstm, x) == [
        Work(2 * 10 * 12 * (4 + 3), 4 * (2 * 5 * 4 + weights + states + 2 * 5 * 3))
    ]


@pytest.mark.parametrize("name", ["msg_tiny_p4_win7_224", "msg_cvpr22_tiny_p4_win7_224", "resnet18"])
def test_operations_are_those_that_the_model_runs(name):
    model = timm.create_model(name, **(dict(attention="eager") if "msg" in name else {})).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    work = count_work(timm.create_model(name).to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(flops for flops, _ in work) == counter.get_total_flops()


def test_each_operation_is_limited_by_arithmetic_or_by_traffic():
    work = [Work(flops=100, bytes=10), Work(flops=10, bytes=100)]
    assert least_seconds(work, flops_per_second=10, bytes_per_second=5) == 10 + 20
