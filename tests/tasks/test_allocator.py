import subprocess
import sys
from pathlib import Path

import pytest

FREE_32_MIB = """
import resource
from pathlib import Path
import torch
from omegaconf import OmegaConf
from tasks.allocator import keep_freed_memory
from tasks.build import prepare_torch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

prepare_torch(OmegaConf.create({"threads": 1, "device": "cpu"}))
before = resident()
tensors = [torch.ones(2**20) for _ in range(8)]
del tensors
print(resident() - before, int(keep_freed_memory()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_job_keeps_the_memory_that_a_step_has_freed():
    found = subprocess.run([sys.executable, "-c", FREE_32_MIB], capture_output=True, text=True, check=True)
    kept, can_keep = map(int, found.stdout.split())
    if not can_keep:
        pytest.skip("the C library has no mallopt")
    assert kept > 28 * 2**20
