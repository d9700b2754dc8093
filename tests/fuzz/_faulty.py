"""Cases that fail in every way there is, for the runner's own test."""

from __future__ import annotations

import os
import signal
import time


def case(seed: int) -> None:
    assert seed != 3, "a broken law"
    if seed == 4:
        raise KeyError("an exception that escapes")
    if seed == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 6:
        time.sleep(600)
