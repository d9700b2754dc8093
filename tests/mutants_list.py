"""The faults that ``make mutants`` seeds, one at a time: each is a mistake somebody made in a kernel like these."""

from __future__ import annotations

from tests.mutants import Mutant

_TILES, _FORWARD, _LOGITS = (f"head/triton/{name}.py" for name in ("tiles", "forward", "logits"))
_ATTENTION, _OUT, _BACK = (f"attention/triton/{name}.py" for name in ("tiles", "forward", "backward"))
_BOUNDS = "attention/bounds.py"
_HEAD_TESTS = ("tests/triton/test_head.py",)
_TREE_TESTS = ("tests/triton/test_tree_attention.py",)
_ORDER_TESTS = ("tests/triton/test_grid_order.py",)


def _head(name: str, file: str, right: str, wrong: str) -> Mutant:
    return Mutant(name, file, right, wrong, _HEAD_TESTS)


def _tree(name: str, file: str, right: str, wrong: str) -> Mutant:
    return Mutant(name, file, right, wrong, _TREE_TESTS)


MUTANTS: tuple[Mutant, ...] = (
    # The LM head.
    _head("vocabulary tail not masked", _TILES, 'tl.where(inside[None, :], v, float("-inf"))', "v"),
    _head("sum not rescaled to the new maximum", _TILES, "total = total * rescale + tl.sum", "total = total + tl.sum"),
    _head("entropy keeps the old reference", _TILES, "(weighted + moved) * rescale", "weighted * rescale"),
    _head("softcap without its square", _TILES, "d *= 1 - ratio * ratio", "d *= 1 - ratio"),
    _head("logit scale missing in the gradient", _TILES, "    d *= scale\n", ""),
    _head(
        "slots of a row share the first one's upstream",
        _TILES,
        "tl.load(slot_gradient + first_slot + j,",
        "tl.load(slot_gradient + first_slot,",
    ),
    _head("width not masked", _TILES, "mask=depth[None, :] < width - k", "mask=depth[None, :] < width"),
    _head(
        "32-bit row offsets",
        _TILES,
        "left_rows[:, None] * left_stride",
        "left_rows.to(tl.int32)[:, None] * left_stride",
    ),
    _head(
        "last vocabulary tile forgotten",
        _FORWARD,
        "tl.minimum(start + tiles_per_split, tl.cdiv(vocabulary, BLOCK_N))",
        "tl.minimum(start + tiles_per_split, vocabulary // BLOCK_N)",
    ),
    _head("splits merged without rescale", _FORWARD, "s = s * rescale + tl.sum", "s = s + tl.sum"),
    _head(
        "log-sum-exp in base 2",
        _FORWARD,
        "tl.store(lse + row, m * spread + log_s * LN_2",
        "tl.store(lse + row, m * spread + log_s",
    ),
    Mutant(
        "ignored rows get a gradient",
        _LOGITS,
        "d = tl.where(read[:, None], d, 0.0)",
        "d = d + 0.0",
        ("tests/triton/test_selective.py",),
    ),
    _head(
        "rows whose slots cancel are dropped",
        "head/tiled_linear.py",
        "active |= u[slots.slots] != 0",
        "active |= slots.row_sums(u[slots.slots])[slots.row_of] != 0",
    ),
    _head(
        "float16 gradients not scaled back", "head/triton/launches.py", "buffer.mul_(self.unscale)", "buffer.mul_(1.0)"
    ),
    _head(
        "a slab takes the neighbour's target",
        _TILES,
        "tl.where((target >= 0) & (target < count), target, -1)",
        "tl.where((target >= 0) & (target <= count), target, -1)",
    ),
    # Tree attention.
    _tree(
        "subtree reaches a row too far",
        _ATTENTION,
        "(columns <= rows) & (rows < end)",
        "(columns <= rows) & (rows <= end)",
    ),
    _tree(
        "a row does not see itself", _ATTENTION, "(columns <= rows) & (rows < end)", "(columns < rows) & (rows < end)"
    ),
    _tree(
        "window in rows, not in depth", _ATTENTION, "distance = row_depth - column_depth", "distance = rows - columns"
    ),
    _tree("window one too wide", _ATTENTION, "(distance < window)", "(distance <= window)"),
    _tree(
        "values not rescaled",
        _OUT,
        "accumulator = accumulator * rescale[:, None] + dot(",
        "accumulator = accumulator + dot(",
    ),
    _tree(
        "query heads read the wrong key head",
        _OUT,
        "kv_head = head // group",
        "kv_head = head % (tl.num_programs(1) // group)",
    ),
    _tree("masked blocks walked as full ones", _OUT, "live if masked else full,", "live,"),
    _tree("softcap slope missing", _BACK, "ds = ds * (1 - slope * slope)", "ds = ds * 1.0"),
    _tree(
        "gradient of the log-sum-exp has the wrong sign",
        _BACK,
        "delta -= tl.load(grad_lse_ptr",
        "delta += tl.load(grad_lse_ptr",
    ),
    _tree(
        "splits lose their remainder",
        _BACK,
        "last = live * (split + 1) // tl.num_programs(2)",
        "last = live // tl.num_programs(2) * (split + 1)",
    ),
    _tree(
        "one query head of a group counts for all", _BACK, "head = kv_head * group + member", "head = kv_head * group"
    ),
    _tree(
        "live blocks judged by their least end",
        _BOUNDS,
        "ends.amax(1), first + block_n - 1",
        "ends.amin(1), first + block_n - 1",
    ),
    _tree("full blocks judged by their largest end", _BOUNDS, "ends.amin(1)])", "ends.amax(1)])"),
    _tree(
        "window bound of a skipped block too narrow",
        _BOUNDS,
        "live &= (nearest < self.window)",
        "live &= (farthest < self.window)",
    ),
    # Races. The interpreter runs programs upwards, and so they give the right numbers; another order shows them.
    Mutant(
        "a split of dV adds the one before it, without waiting",
        _BACK,
        "    tl.store(dv_pointers, dv.to(",
        """    if split > 0:
        former = dv_pointers - dv_stride_split
        dv += tl.load(former, mask=here[:, None] & (values < DV)[None, :], other=0.0)
        tl.store(former, tl.zeros_like(dv), mask=here[:, None] & (values < DV)[None, :])
    tl.store(dv_pointers, dv.to(""",
        _ORDER_TESTS,
    ),
    Mutant(
        "a row block adds its column sums to those before it, without waiting",
        "head/triton/gradient.py",
        "    if column_sums is not None:\n",
        """    if column_sums is not None:
        if block > 0:
            former = column_sums + partial - (last_column - first_column)
            d += tl.where(tl.arange(0, BLOCK_M)[:, None] == 0, tl.load(former, mask=inside, other=0.0)[None, :], 0.0)
            tl.store(former, tl.zeros([BLOCK_N], tl.float32), mask=inside)
""",
        _ORDER_TESTS,
    ),
    # Losses and scores, on any backend.
    Mutant(
        "margin without the rank difference",
        "losses.py",
        "hinge = margin * lag.double()",
        "hinge = margin * torch.ones_like(lag).double()",
        ("tests/tuna_kernels/test_losses.py",),
        interpret=False,
    ),
    Mutant(
        "subtree ends a row early",
        "tree.py",
        "subtree_end[path[keep:depth]] = start",
        "subtree_end[path[keep:depth]] = start - 1",
        ("tests/tuna_kernels/test_tree.py",),
        interpret=False,
    ),
)
