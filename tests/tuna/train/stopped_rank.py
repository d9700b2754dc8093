"""A rank of ``test_stopping.py``: trains in a folder; told to, rank 1 sends itself SIGTERM after step 3."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.tuna.train.test_durability import At, saving
from tests.tuna.train.test_trainer import ragged, tiny_llama
from tuna.system import lifeline
from tuna.train.distributed import end_ranks
from tuna.train.stopping import Stopped
from tuna.train.trainer import TunaTrainer

lifeline.watch_launcher()
folder = Path(sys.argv[1])
trainer = TunaTrainer(tiny_llama(), saving(folder, save_steps=1000, max_steps=int(sys.argv[2])), ragged(8))
if sys.argv[3] == "stop" and os.environ["RANK"] == "1":
    trainer.add_callback(At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
if os.environ["RANK"] == "0":
    trainer.add_callback(At(2, (folder / "going").touch))
try:
    trainer.train(resume_from_checkpoint=True)
except Stopped:
    end_ranks()
    sys.exit(3)
if os.environ["RANK"] == "0":
    trainer.model.save_pretrained(folder)
end_ranks()
