"""DeepSpeed's converter to its universal format, as a program that runs no code in the checkpoint.

Its worker processes import this file again if they are not forked, so the allowed classes are set at its top level.
"""

from __future__ import annotations

import os
import sys

import torch

from tuna.system import lifeline
from tuna.train import trust

TRUST = "--trust"
if TRUST not in sys.argv:
    os.environ.pop(trust.FORCE_NOT, None)
    os.environ[trust.FORCE] = "1"
    torch.serialization.add_safe_globals(trust.allow_deepspeed())

if __name__ == "__main__":
    from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

    lifeline.watch_parent()
    if TRUST in sys.argv:
        sys.argv.remove(TRUST)
    main(parse_arguments())
