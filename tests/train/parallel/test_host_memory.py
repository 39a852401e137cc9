"""Freed memory is reused: pages are not cleared again for every step."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from interloom.train.parallel.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    # As a forward and a backward pass: all alive at once, then freed together.
    blocks = [torch.empty(size, dtype=torch.uint8).fill_(1) for size in (3 << 20, 40 << 20, 200_000, 9 << 20)]
for _ in range(20): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_a_step_faults_no_pages_that_the_one_before_had() -> None:
    def faults(kind: str) -> int:
        line = [sys.executable, "-c", COUNT_FAULTS, kind]
        return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") * 20 < faults("returned")
