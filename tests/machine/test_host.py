import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from edmdistill.machine.host import keep_freed_memory
if {kept}:
    keep_freed_memory()
for _ in range(3):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [bytes([i]) * (16 * 2**20) for i in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the parameters are those of glibc's malloc")
def test_large_blocks_that_were_freed_cost_no_pages_again() -> None:
    default, kept = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(kept=kept)])) for kept in (False, True)
    )
    assert default > 100 > kept
