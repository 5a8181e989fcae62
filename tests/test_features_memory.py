import ctypes
import subprocess
import sys

import pytest

GROW_AND_FREE = """
import resource
import sys
import torch
from features.memory import give_back, keep_freed

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

if sys.argv[1] == "keep":
    keep_freed()
before = resident_mib()
large = torch.ones(80 * 2**18)  # 80 MiB
grown = resident_mib()
del large
left = resident_mib()
give_back()
print(grown - before, left - before, resident_mib() - before)
"""


def grown_and_left(way: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", GROW_AND_FREE, way], capture_output=True, text=True, check=True
    )
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="only glibc is asked to keep memory",
)
def test_freed_memory_is_kept_where_it_is_asked_for():
    grown, left, given_back = grown_and_left("keep")
    assert grown > 70
    assert left > 70
    assert given_back < 20
    grown, left, _ = grown_and_left("as it is")
    assert grown > 70
    assert left < 20
