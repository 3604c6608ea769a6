import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from fastsnap.training.allocator import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**20)  # 4 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
page_faults()
sys.exit(page_faults() > 100)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_freed_block_is_used_again_without_the_system_clearing_it() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=False)
    assert done.returncode == 0
