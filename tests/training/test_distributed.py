"""What processes tell each other."""

import json
import sys

from helpers import ROOT, start_two

SCRIPT = """
import json

import torch

import distributed
from analysis.report import OutcomeCollector
from main import evaluate
from distributed import Compute
from utils import UserError

assert distributed.rank_and_world_size() == (0, 1)
distributed.start_process_group(torch.device("cpu"), 600)
rank, world_size = distributed.rank_and_world_size()
norm = torch.nn.BatchNorm1d(2)
norm.running_mean.fill_(rank + 5)
distributed.send_buffers(norm)


def refuse():
    raise UserError(f"rank {rank} refuses")


try:
    refusal = distributed.from_rank_0(refuse)
except UserError as error:
    refusal = str(error)


class Batches(list):
    def check_failures(self):
        pass


# As after an epoch, where every process has taken statistics of its own images.
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
with torch.no_grad():
    model[2].weight.copy_(torch.eye(2))
    model[2].bias.zero_()
model[1].running_mean.copy_(torch.tensor([3.0, 0.0]) * rank)
batches, compute = [(torch.eye(2)[:, None, None], torch.tensor([0, 1]))], Compute(torch.device("cpu"))
evaluated = evaluate(model, Batches(batches), compute, 1)
# Fewer images than processes: rank 1 has none.
collector = OutcomeCollector()
alone = evaluate(model, Batches(batches[rank:]), compute, 1, collector)
outcomes = collector.gather([0, 1][2 * rank :])
found = dict(
    total=distributed.sum_over_processes(torch.tensor([1.0, rank])).tolist(),
    largest=distributed.largest_over_processes(15, 10 * rank, 3 - rank),
    lists=distributed.gather_lists([rank] * (rank + 1)),
    decision=distributed.from_rank_0(lambda: rank),
    refusal=refusal,
    buffers=norm.running_mean.tolist(),
    evaluated=[round(figures[name], 4) for figures in (evaluated, alone) for name in ("val_loss", "acc1")],
    images=outcomes.index.tolist() if outcomes else None,
)
distributed.stop_process_group()
print(json.dumps(found))
"""


def test_two_processes_agree_on_sums_extremes_lists_decisions_and_figures(tmp_path, port):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    runs = start_two(tmp_path, [[sys.executable, script]] * 2, port, PYTHONPATH=str(ROOT))
    for rank, run in enumerate(runs):
        assert run.wait() == 0, run.text()
        assert json.loads(run.text().splitlines()[-1]) == dict(
            total=[2, 1],
            largest=[15, 10, 3],
            lists=[0, 1, 1] if rank == 0 else None,
            decision=0,
            refusal="rank 0 refuses",
            buffers=[5, 5],
            evaluated=[0.3133, 100] * 2,  # log(1 + 1/e), by the statistics of rank 0 on both
            images=[0, 1] if rank == 0 else None,
        )
