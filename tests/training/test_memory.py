"""What utils.py makes of the C library, seen by the pages that the kernel has to clear."""

import os
import platform
import subprocess
import sys

import pytest
from helpers import ROOT, digits_config
from helpers import coco_config as shapes_config

from distributed import smaller_run

FAULTS = """
import resource, sys, torch
from utils import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for repeat in range(30):
    if repeat == 10:  # the pages of the first ones are new in any case
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cleared(choice, **variables):
    """Pages that the kernel cleared for 20 tensors of 64 MiB, each freed before the next."""
    names = ("GLIBC_TUNABLES", "MALLOC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment.update(variables, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", FAULTS, choice]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_freed_memory_is_used_again_unless_variables_of_glibc_say_otherwise():
    released, kept = cleared("default"), cleared("keep")
    assert kept < released / 20
    assert cleared("keep", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072") > released / 2


def test_what_needs_less_memory_is_told_by_the_keys_that_count():
    batch = "lower DATA.BATCH_SIZE (--batch-size), which is 5"
    training = f"{batch}, and raise TRAIN.ACCUMULATION_STEPS as much"
    training += ", or set TRAIN.USE_CHECKPOINT True (--use-checkpoint)"
    assert smaller_run(digits_config(batch_size=5)) == training
    assert smaller_run(digits_config(batch_size=5, eval=True)) == batch
    assert smaller_run(digits_config(batch_size=5, throughput=True)) == batch
    found = smaller_run(shapes_config("shapes", "DATA.BATCH_SIZE", 5))
    assert found == f"{training}, or lower DET.MIN_SIZES and DET.MAX_SIZE"
