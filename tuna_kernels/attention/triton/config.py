"""Launch configurations of tree attention: a fixed choice per kernel, kind of tensor core, head size and dtype, and two
smaller tiles that tuning also tries.

(BLOCK_M queries, BLOCK_N keys, warps, pipeline stages). They were chosen from the compiled code, without a GPU
(`make gpu-static` shows it): the largest tiles that spill nothing and fit the shared memory of a block. The limits of
each kernel:

- forward holds one accumulator of M × d and streams K and V: a tall tile of queries reads each key block least often.
- dq holds two query tiles and an accumulator: M as large as registers allow, N small.
- dkv holds two accumulators of N × d and computes two tiles of scores: large N, small M; if both do not fit, N is 64.

How often K and V (or Q and dO) are read depends on M in the first two and on N in the third; the other side is kept
small, which costs iterations and saves registers.

`mma` is for sm_80, 86, 89 and 120, whose tensor cores read registers; their consumer cards have 99 KiB of shared memory
per block, which all choices respect, so that one table is enough. `wgmma` (sm_90) and `tcgen05` (sm_100) read operands
from shared memory, of which they have 227 KiB.
"""

from __future__ import annotations

from tuna_kernels.gpu.static_case import Config

_Row = tuple[int, int, int, int]

_HALF: dict[str, dict[str, dict[int, _Row]]] = {
    "mma": {
        "forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
        "dkv": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    },
    "wgmma": {
        "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dkv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 64, 8, 2)},
    },
    "tcgen05": {
        "forward": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dkv": {64: (64, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    },
}

_TF32: dict[str, dict[int, _Row]] = {
    "forward": {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 1)},
    "dq": {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 16, 8, 1)},
    "dkv": {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 1)},
}

# Without tensor cores a thread holds entire rows of both factors: half as many keys, or twice as many threads.
_IEEE: dict[str, dict[int, _Row]] = {
    "forward": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (32, 32, 8, 1)},
    "dq": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (32, 16, 8, 1)},
    "dkv": {64: (32, 16, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 1)},
}

# With a softcap the scores live to the end of an iteration, for its slope: half as many queries at a time.
_SOFTCAP: dict[tuple[str, str, int], _Row] = {
    ("mma", "dq", 128): (64, 32, 8, 2),
    ("wgmma", "dkv", 128): (16, 128, 8, 2),
}


def candidates(kernel: str, capability: int, size: int, products: str, *, softcap: bool = False) -> tuple[Config, ...]:
    """The configurations of a kernel: the fixed choice, then the other candidates for tuning (`launch.choose`).

    Those are the same tile with half the queries or half the keys, each with half the warps: more programs, and
    less shared memory than the fixed choice, so they fit whenever it does. They pay for small trees.

    Args:
        kernel: `"forward"`, `"dq"` or `"dkv"`.
        capability: compute capability, e.g. 90.
        size: the larger padded head size, a power of two up to 256.
        products: precision of the products: `"half"`, or for float32 `"tf32"` or `"ieee"`.
        softcap: whether scores are capped.
    """
    units = {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma")
    table = {"half": _HALF[units], "tf32": _TF32, "ieee": _IEEE}[products][kernel]
    limit = next(limit for limit in table if size <= limit)
    m, n, warps, stages = table[limit]
    if softcap and products == "half":
        m, n, warps, stages = _SOFTCAP.get((units, kernel, limit), table[limit])
    fewer = max(4, warps // 2)
    rows = [(m, n, warps), (max(16, m // 2), n, fewer), (m, max(16, n // 2), fewer)]
    return tuple(Config({"BLOCK_M": a, "BLOCK_N": b}, w, stages) for a, b, w in dict.fromkeys(rows))
