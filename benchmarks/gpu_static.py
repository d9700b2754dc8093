"""`python -m benchmarks.gpu_static` (`make gpu-static`): what the compiler made of every GPU kernel, with no GPU.

Every kernel that lists itself (`STATIC` in its file) is compiled for every architecture in every configuration that
may be launched there, down to the binary. The table tells registers, spills, shared memory, tensor-core and
asynchronous-copy instructions and the occupancy those allow; a second table the arithmetic intensity and the roofline
time of the operations at LLaMA-7B and 128k-vocabulary shapes. What breaks a budget is named and the exit code is 1:

* shared memory within what a block may take on that architecture, in every configuration; no call into a library;
* a configuration chosen by default spills nothing; with 16-bit inputs it uses the tensor-core instructions of its
  architecture (unless the kernel's file says why not: `StaticCase.mma_sync`) and asynchronous copies.

What tuning tries besides may spill: it is timed, and taken only where it is quicker all the same. How many do is told.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.roofline import roofline_rows
from tuna_kernels.gpu import availability
from tuna_kernels.gpu.static_case import ARCHITECTURES, SHARED_MEMORY, Config, StaticCase, compile_case, kernel_modules

# Registers, shared memory (bytes), threads and blocks of one multiprocessor (CUDA C++ programming guide).
LIMITS = {
    80: (65536, 164 << 10, 2048, 32),
    86: (65536, 100 << 10, 1536, 16),
    89: (65536, 100 << 10, 1536, 24),
    90: (65536, 228 << 10, 2048, 32),
    100: (65536, 228 << 10, 2048, 32),
    120: (65536, 100 << 10, 1536, 32),
}
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # elsewhere mma.sync
AMD = "gfx942"


@dataclass(frozen=True)
class Built:
    """What came out for one kernel, configuration and architecture. `default`: the configuration taken untuned."""

    kernel: str
    capability: int
    config: str
    default: bool
    products: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: int
    other_products: int
    async_copies: int
    occupancy: float
    faults: tuple[str, ...]


@functools.cache
def all_cases() -> tuple[StaticCase, ...]:
    """The `STATIC` of every module beside the kernels."""
    return tuple(case for module in kernel_modules().values() for case in getattr(module, "STATIC", ()))


def jobs(
    cases: Sequence[StaticCase], architectures: Sequence[int], *, defaults_only: bool
) -> Iterator[tuple[int, int, int]]:
    """(case, architecture, configuration) to build, as indices that another process understands."""
    for number, case in enumerate(cases):
        for capability in architectures:
            count = min(len(case.configs.get(capability, ())), 1 if defaults_only else 10**6)
            yield from ((number, capability, which) for which in range(count))


def build(job: tuple[int, int, int]) -> Built:
    """Compile and assemble one job, and hold it against the budgets."""
    number, capability, which = job
    case = all_cases()[number]
    return examine(case, case.configs[capability][which], capability, default=which == 0)


def examine(case: StaticCase, config: Config, capability: int, *, default: bool) -> Built:
    """One kernel in one configuration on one architecture."""
    compiled = compile_case(case, config, capability)
    ptx: str = compiled.asm["ptx"]
    registers, spills = resources(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    wanted = "mma.sync" if capability in case.mma_sync else TENSOR_CORES.get(capability, "mma.sync")
    tensor, plain = len(re.findall(re.escape(wanted), ptx)), len(re.findall(r"\bmma\.sync", ptx))
    copies = len(re.findall(r"\bcp\.async(?!\.(?:wait|commit|mbarrier))", ptx))
    faults = []
    if shared > SHARED_MEMORY[capability]:
        faults.append(f"{shared} bytes of shared memory, {SHARED_MEMORY[capability]} are allowed")
    if default and spills:
        faults.append(f"spills {spills} bytes")
    if default and case.products and not tensor:
        faults.append(f"no {wanted}")
    if re.search(r"^\s*call", ptx, re.MULTILINE):
        faults.append("calls a function of a library")
    if default and case.products and not copies:
        faults.append("no asynchronous copies")
    return Built(
        kernel=case.name,
        capability=capability,
        config=describe_config(config),
        default=default,
        products=case.products,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        tensor_core=tensor,
        other_products=plain if wanted != "mma.sync" else 0,
        async_copies=copies,
        occupancy=occupancy(capability, registers, shared, config.num_warps),
        faults=tuple(faults),
    )


def describe_config(config: Config) -> str:
    """ "64x64, 4 warps, 3 stages"."""
    blocks = ", ".join(f"{name.removeprefix('BLOCK_').lower()} {size}" for name, size in config.blocks.items())
    return f"{blocks}; {config.num_warps} warps, {config.num_stages} stages"


def resources(binary: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack it needs (what did not fit into registers), of a compiled kernel."""
    tool = Path(backend_file()).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", told, re.DOTALL)
    if used is None:
        raise RuntimeError(f"cuobjdump told no registers: {told.strip()}")
    return int(used[1]), int(used[2]) + int(used[3])


def backend_file() -> str:
    """Where the triton package lies."""
    import triton

    return str(triton.__file__)


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's threads that can be resident: what registers, shared memory and slots allow."""
    all_registers, all_shared, threads, blocks = LIMITS[capability]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps in units of 256
    fitting = min(
        blocks,
        threads // (32 * warps),
        all_registers // (per_warp * warps),
        all_shared // (shared + 1024),  # the system takes 1 KiB a block
    )
    return fitting * warps * 32 / threads


def amd_result(case: StaticCase) -> str:
    """ "" if Triton compiles the kernel for an MI300, else why not. Nothing else is claimed about AMD."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, config = case.kernel(), case.configs[80][0]
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={**case.constants, **config.blocks})
    try:
        triton.compile(source, target=GPUTarget("hip", AMD, 64), options={"num_warps": config.num_warps})
    except Exception as error:  # whatever a compiler for another vendor throws is the answer
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return ""


def built_table(found: Sequence[Built]) -> Table:
    """Everything that was built; what breaks a budget is red."""
    table = Table(title="compiled kernels")
    columns = (
        "kernel",
        "sm",
        "configuration",
        "registers",
        "spills",
        "shared KiB",
        "tensor-core",
        "async",
        "occupancy",
    )
    for column in (*columns, "fault"):
        table.add_column(column, justify="left" if column in ("kernel", "configuration", "fault") else "right")
    for one in found:
        cells = [one.kernel, str(one.capability), one.config + (" *" if one.default else ""), str(one.registers)]
        cells += [str(one.spill_bytes), f"{one.shared_bytes / 1024:.1f}", str(one.tensor_core), str(one.async_copies)]
        table.add_row(*cells, f"{one.occupancy:.0%}", "; ".join(one.faults), style="red" if one.faults else None)
    table.caption = "*: taken without tuning. tensor-core: mma.sync, wgmma (sm_90) or tcgen05 (sm_100) in the PTX"
    return table


def markdown(found: Sequence[Built], amd: dict[str, str]) -> str:
    """The defaults, the roofline and AMD as Markdown."""
    lines = [
        "# GPU kernels, compiled without a GPU",
        "",
        "Written by `make gpu-static`. Configurations taken untuned:",
        "",
    ]
    lines += ["| kernel | sm | configuration | registers | spills | shared KiB | tensor-core | async | occupancy |"]
    lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for one in found:
        if one.default:
            lines.append(
                f"| {one.kernel} | {one.capability} | {one.config} | {one.registers} | {one.spill_bytes} | "
                f"{one.shared_bytes / 1024:.1f} | {one.tensor_core} | {one.async_copies} | {one.occupancy:.0%} |"
            )
    lines += [
        f"\n{case.name} uses mma.sync on sm_{c}: {why}." for case in all_cases() for c, why in case.mma_sync.items()
    ]
    lines += ["", "Roofline: the least time the operation can take, by arithmetic and by memory traffic.", ""]
    header, *rows = roofline_rows()
    lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if amd:
        lines += ["", f"Compiles for {AMD}:", ""]
        lines += [f"* {name}: {reason or 'yes'}" for name, reason in amd.items()]
    return "\n".join([*lines, ""])


def main(
    architecture: Annotated[list[int] | None, typer.Option(help="80, 86, 89, 90, 100, 120; may be repeated.")] = None,
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    defaults_only: Annotated[bool, typer.Option("--defaults", help="Only the configurations taken untuned.")] = False,
    amd: Annotated[bool, typer.Option(help=f"Also try {AMD}.")] = True,
    processes: Annotated[int, typer.Option(help="Compilers at once.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for gpu_static.json and .md.")] = Path("results/local"),
) -> None:
    """Compile every kernel for every architecture; exit with 1 when a budget is broken."""
    if availability.is_interpreted():
        raise typer.BadParameter("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
    wrong = [one for one in architecture or [] if one not in ARCHITECTURES]
    if wrong:
        raise typer.BadParameter(f"--architecture {wrong[0]} is not one of {ARCHITECTURES}")
    cases = all_cases()
    chosen = [
        job
        for job in jobs(cases, architecture or ARCHITECTURES, defaults_only=defaults_only)
        if kernel in cases[job[0]].name
    ]
    console = Console()
    if not console.is_terminal:
        console.width = 180
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        found = list(track(pool.map(build, chosen), "compiling", total=len(chosen), console=Console(stderr=True)))
    on_amd = {case.name: amd_result(case) for case in cases if kernel in case.name} if amd else {}
    console.print(built_table(found))
    header, *rows = roofline_rows()
    roofline = Table(*header, title="roofline")
    for row in rows:
        roofline.add_row(*row)
    console.print(roofline)
    output.mkdir(parents=True, exist_ok=True)
    content = {"kernels": [asdict(one) for one in found], "roofline": [header, *rows], AMD: on_amd}
    (output / "gpu_static.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (output / "gpu_static.md").write_text(markdown(found, on_amd), encoding="utf-8")
    broken = [one for one in found if one.faults]
    for one in broken:
        console.print(f"{one.kernel}, sm_{one.capability}, {one.config}: {'; '.join(one.faults)}", style="red")
    tuned = [one for one in found if not one.default]
    console.print(
        f"{len(tuned)} builds are of configurations for tuning, {sum(one.spill_bytes > 0 for one in tuned)} spill"
    )
    console.print(
        f"{len(found)} builds, {len(broken)} break a budget; {sum(not r for r in on_amd.values())} of "
        f"{len(on_amd)} kernels compile for {AMD}"
    )
    raise typer.Exit(int(bool(broken)))


if __name__ == "__main__":
    typer.run(main)
