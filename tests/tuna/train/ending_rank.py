"""A rank of ``test_ranks.py``: holds Python's lock until a worker thread is the last to own a collective's tensors."""

from __future__ import annotations

import sys
import time

import torch
from accelerate import PartialState

from tuna.train.distributed import end_ranks

PartialState(cpu=True)
kept = torch.distributed.group.WORLD  # as DistributedDataParallel does
sys.setswitchinterval(60)
torch.distributed.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4), async_op=True)
until = time.perf_counter() + 0.5
while time.perf_counter() < until:
    pass
end_ranks()
