"""How a process that trains is set up."""

import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from labeleff.process import keep_freed_memory

keep_freed_memory()


def step():
    return [torch.ones(2 << 20) for _ in range(12)]  # 96 MiB, freed at once


for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can be told")
def test_freed_memory_is_used_again_without_asking_the_system():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100  # 240,000 of 4 KiB each where all is given back
