"""Law: a rank that did its work ends with code 0, whatever its worker threads still hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tuna.launching import TORCHRUN

# Holds Python's lock until a worker thread is the last to own a collective's tensors.
SCRIPT = """
import sys, time, torch
from accelerate import PartialState
from tuna.ranks import end_ranks

PartialState(cpu=True)
kept = torch.distributed.group.WORLD  # as DistributedDataParallel does
sys.setswitchinterval(60)
torch.distributed.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4), async_op=True)
until = time.perf_counter() + 0.5
while time.perf_counter() < until:
    pass
end_ranks()
"""


def test_a_rank_ends_whole_though_its_threads_wait_for_python(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *TORCHRUN, "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
