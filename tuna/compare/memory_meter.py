"""Two memory meters: what torch's allocator was asked for, and what the process used.

* `allocator_peak` sums the allocation events of torch's profiler as a stream. Exact, and blind to memory that
  is not torch's (the packing buffers of a BLAS, the interpreter, the allocations of numpy).
* `resident_peak` reads the growth of the resident set. Sees everything, is right to a few pages, and must run
  in a fresh process: memory that an earlier call freed but the C library kept would hide the growth.
  `in_fresh_process` starts one.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from tuna.system import lifeline

_ANSWER = "answer: "
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): writing 5 sets VmHWM back to the present VmRSS


class ResidentPeak(NamedTuple):
    """Bytes: `growth` is the peak minus the size just before, `process` the peak itself, interpreter and
    libraries included."""

    growth: int
    process: int


def allocator_peak(call: Callable[[], object]) -> int:
    """Largest number of bytes that torch held on the CPU at once, of those it took while `call` ran.

    Results of `call` count, its inputs do not. What `call` frees of older memory is not subtracted, whether the
    profiler reports it (it remembers addresses of earlier profiles) or not.
    """
    gc.collect()
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    inner: Any = profiler.profiler
    events = sorted(_allocations(inner.kineto_results.experimental_event_tree()))
    del kept
    live: dict[int, int] = {}
    held = peak = 0
    for _, address, size in events:
        if size > 0:
            held += size
            live[address] = size
        else:
            held -= live.pop(address, 0)
        peak = max(peak, held)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """`(time in ns, address, bytes; negative when freed)` of all allocations in a tree of profiler events."""
    for event in events:
        tag, fields = event.typed
        if tag == _EventType.Allocation:
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _allocations(event.children)


def resident_peak(call: Callable[[], object]) -> ResidentPeak:
    """Peak of this process's resident set while `call` ran.

    Uses `VmHWM`, set back first. Where the kernel does not offer that, `ru_maxrss` is taken, which is too
    large if the process was ever larger than during `call`: use a fresh process.
    """
    gc.collect()
    _trim_heap()
    resettable = _reset_peak()
    before = _status_bytes("VmRSS") if _STATUS.exists() else _max_rss()
    kept = call()
    peak = _status_bytes("VmHWM") if resettable else _max_rss()
    del kept
    return ResidentPeak(max(peak - before, 0), peak)


def in_fresh_process(target: str, arguments: dict[str, Any], *, threads: int, timeout: float = 1800.0) -> Any:
    """Call `target` ("module:function") with `arguments` in a new interpreter and return what it returns.

    Arguments and answer travel as JSON. Raises `RuntimeError` with the last line of the child's error output
    when it fails or dies.
    """
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    repository = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [repository, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tuna.compare.memory_meter", target, json.dumps(arguments)]
    with lifeline.start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            output, errors = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{target} in a fresh process took more than {timeout:.0f} s") from None
        finally:
            child.kill()  # nothing where it has ended
    answers = [line for line in output.splitlines() if line.startswith(_ANSWER)]
    if child.returncode != 0 or not answers:
        reason = (errors.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{target} in a fresh process ended with {child.returncode}: {reason}")
    return json.loads(answers[-1].removeprefix(_ANSWER))


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what native code writes to file descriptor 2: the profiler announces itself there, unasked."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _trim_heap() -> None:
    """Give freed memory back, so that it does not hide the growth of the next call (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _main(target: str, arguments: str) -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, _, function = target.partition(":")
    answer = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(_ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    lifeline.watch_parent()
    _main(sys.argv[1], sys.argv[2])
