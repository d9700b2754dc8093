"""`tuna plan`: what a training step takes and where it fits, before any GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tuna.plan.comparison import Row
    from tuna.plan.planner import Plan, Planner, PlanRequest
    from tuna.plan.workload import Workload

__all__ = ["plan"]

MODEL, DATA, STEP, MACHINE, OUTPUT = "Model", "Data", "Step", "Machine", "Output"


def _flag(*names: str, help: str, panel: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


def plan(
    context: typer.Context,
    model: Annotated[
        str | None,
        _flag(help="A size (llama-7b, llama3-8b, …), a hub name, a folder, or a config.json.", panel=MODEL),
    ] = None,
    vocab: Annotated[int | None, _flag(help="Or a Llama by its sizes: the vocabulary,", panel=MODEL)] = None,
    hidden: Annotated[int | None, _flag(help="the width,", panel=MODEL)] = None,
    ffn: Annotated[int | None, _flag(help="the width of the MLP,", panel=MODEL)] = None,
    layers: Annotated[int | None, _flag(help="the layers,", panel=MODEL)] = None,
    heads: Annotated[int | None, _flag(help="the attention heads,", panel=MODEL)] = None,
    kv_heads: Annotated[int | None, _flag(help="and their key-value heads.", panel=MODEL)] = None,
    k: Annotated[int, _flag("-k", "--responses", help="Responses of a group.", panel=DATA)] = 5,
    prompt: Annotated[int, _flag(help="Tokens of a prompt.", panel=DATA)] = 256,
    response: Annotated[int, _flag(help="Tokens of a response.", panel=DATA)] = 256,
    data: Annotated[str | None, _flag(help="Or real ranked records, whose lengths count.", panel=DATA)] = None,
    tokenizer: Annotated[str | None, _flag(help="For --data. Default: the model's.", panel=DATA)] = None,
    template: Annotated[str | None, _flag(help="For --data, as in tuna train.", panel=DATA)] = None,
    max_length: Annotated[int, _flag(help="For --data, as in tuna train.", panel=DATA)] = 512,
    groups: Annotated[int, _flag(help="Groups of a micro-batch.", panel=STEP)] = 1,
    method: Annotated[
        str, _flag(help="The way that must fit: one_pass, two_phase, unshared or baseline.", panel=STEP)
    ] = "one_pass",
    precision: Annotated[str, _flag(help="bf16, fp16 or fp32.", panel=STEP)] = "bf16",
    lora_r: Annotated[int | None, _flag(help="Rank of adapters. Default: train everything.", panel=STEP)] = None,
    optimizer: Annotated[
        str, _flag(help="adamw (float32 masters), kahan (bf16 states), adamw8bit.", panel=STEP)
    ] = "adamw",
    checkpointing: Annotated[bool, _flag(help="Recompute layers in the backward.", panel=STEP)] = True,
    candidates_per_pass: Annotated[int, _flag(help="Of two-phase.", panel=STEP)] = 1,
    most_groups: Annotated[int, _flag(help="Look for the largest micro-batch up to so many.", panel=STEP)] = 128,
    gpu: Annotated[
        str, _flag(help="rtx3090 (or 3090), v100, a100-40, l40s, a100-80, h100-80, b200-192, …", panel=MACHINE)
    ] = ("a100-80"),
    gpus: Annotated[int, _flag(help="GPUs in all.", panel=MACHINE)] = 1,
    gpus_per_node: Annotated[int, _flag(help="GPUs of a node.", panel=MACHINE)] = 8,
    zero: Annotated[int | None, _flag(help="ZeRO stage. Default: the lowest that fits.", panel=MACHINE)] = None,
    offload: Annotated[str, _flag(help="To host memory: none, optimizer or all.", panel=MACHINE)] = "none",
    host_memory: Annotated[float | None, _flag(help="GiB of each node.", panel=MACHINE)] = None,
    json_file: Annotated[Path | None, _flag("--json", help="Write the figures to this file.", panel=OUTPUT)] = None,
    picture: Annotated[Path | None, _flag(help="Draw the memory of a GPU to this .png.", panel=OUTPUT)] = None,
) -> None:
    """Say what a training step takes, what fits, and how few GPUs will do. No GPU and no weights are needed.

    Fails with the reason, and with the nearest plan that fits, where the one asked for does not.
    """
    from tuna.cli.messages import refuse_given
    from tuna.console.terminal import Terminal
    from tuna.plan.planner import Planner
    from tuna.plan.simulate import Simulator
    from tuna.plan.sizes import explicit_config, model_config
    from tuna.train.outputs import check_files

    check_files({"json": json_file, "picture": picture}, {"data": data}, model=model)

    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    if data is None:
        refuse_given(context, "it is for --data", "tokenizer", "template", "max_length")
    else:
        refuse_given(context, "--data decides it", "k", "prompt", "response")
    if (model is None) == all(value is None for value in sizes.values()):
        raise ValueError("give --model, or a model by its sizes (--vocab --hidden --ffn --layers --heads)")
    config = explicit_config(**sizes) if model is None else model_config(model)
    workload = _workload(k, prompt, response, data, tokenizer or model, template, max_length)
    request = _request(
        workload, groups, method, precision, lora_r, optimizer, checkpointing, candidates_per_pass, gpu, gpus,
        gpus_per_node, zero, offload, host_memory,
    )  # fmt: skip
    planner = Planner(Simulator(config))
    if zero is None:
        request = _lowest_stage(planner, request)
    console = Terminal()
    rows = _compare(console, planner, request, most_groups)
    title = f"{model or 'model'}: {workload.describe()}, {_setting(request)}"
    console.print(_table(title, rows))
    _write(rows, title, json_file, picture)
    _advise(console, planner, request, model, data=data, template=template, max_length=max_length)
    planner.checked(request)


def _advise(console: Console, planner: Planner, request: PlanRequest, model: str | None, **reading: Any) -> None:
    """The commands to go on with: of the plan that fits with the least change, and of adapters beside offload."""
    from dataclasses import replace

    from tuna.plan.advice import adapters, train_command
    from tuna.plan.planner import describe

    if request.settings.method == "baseline":
        request = replace(request, settings=replace(request.settings, method="one_pass"))
    nearest = planner.nearest(request)
    found: list[tuple[str, Plan | None]] = [("train", nearest)]
    changed = nearest is None or nearest.request.sharding.gpus > request.sharding.gpus
    if changed or (nearest is not None and nearest.states.host):
        found.append(("or adapters alone", adapters(planner, request)))
    for what, plan in found:
        if plan is not None:
            console.print(f"{what}, {describe(plan)}:", markup=False, highlight=False, soft_wrap=True)
            console.print(f"  {train_command(plan, model, **reading)}", markup=False, highlight=False, soft_wrap=True)


def _workload(
    k: int, prompt: int, response: int, data: str | None, tokenizer: str | None, template: str | None, max_length: int
) -> Workload:
    from tuna.plan.workload import Workload

    if data is None:
        return Workload(k, prompt, response)
    if tokenizer is None:
        raise ValueError("--data needs --tokenizer (or a --model that brings one)")
    from tuna.data.records import read_records
    from tuna.data.templates import DEFAULT, saved_template
    from tuna.data.tokenization import tokenize_records
    from tuna.models.loading import load_tokenizer

    shown = template or saved_template(tokenizer) or DEFAULT
    found = read_records(data, format="auto", on_bad="skip")
    groups, _ = tokenize_records(
        found.records, load_tokenizer(tokenizer), template=shown, max_length=max_length, on_bad="skip"
    )
    if not groups:
        raise ValueError(f"data = {data!r} holds no record that can be used")
    return Workload(groups=tuple(item.group for item in groups))


def _request(
    workload: Workload, groups: int, method: str, precision: str, lora_r: int | None, optimizer: str,
    checkpointing: bool, candidates_per_pass: int, gpu: str, gpus: int, gpus_per_node: int, zero: int | None,
    offload: str, host_memory: float | None,
) -> PlanRequest:  # fmt: skip
    import torch

    from tuna.plan.cards import find_card
    from tuna.plan.planner import GIB, PlanRequest
    from tuna.plan.settings import StepSettings
    from tuna.plan.states import Sharding
    from tuna.plan.workload import METHODS

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in dtypes:
        raise ValueError(f"precision = {precision!r} is not one of {tuple(dtypes)}")
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is not one of {METHODS}")
    for name, value in (("groups", groups), ("candidates_per_pass", candidates_per_pass), ("lora_r", lora_r)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    stage = zero if zero is not None else {"none": 0, "optimizer": 2}.get(offload, 3)
    return PlanRequest(
        card=find_card(gpu),
        workload=workload,
        groups=groups,
        settings=StepSettings(
            method=method,
            dtype=dtypes[precision],
            checkpointing=checkpointing,
            lora_rank=lora_r,
            candidates_per_pass=candidates_per_pass,
        ),
        sharding=Sharding(gpus, gpus_per_node, stage, offload),  # type: ignore[arg-type]
        optimizer=optimizer,  # type: ignore[arg-type]
        host_memory=None if host_memory is None else int(host_memory * GIB),
    )


def _lowest_stage(planner: Planner, request: PlanRequest) -> PlanRequest:
    """The request at the lowest stage that fits, else at the highest there is."""
    from dataclasses import replace

    from tuna.plan.planner import shardings

    asked = request.sharding
    tried = [replace(request, sharding=s) for s in shardings(asked, asked.gpus, (asked.offload,))]
    return next((other for other in tried if planner.plan(other).fits), tried[-1])


def _compare(console: Any, planner: Planner, request: PlanRequest, most_groups: int) -> list[Row]:
    from tuna.plan.comparison import compare
    from tuna.plan.workload import METHODS

    with console.status("simulating …") as status:
        return compare(planner, request, METHODS, lambda name: status.update(f"simulating {name} …"), most_groups)


def _setting(request: PlanRequest) -> str:
    sharding, settings = request.sharding, request.settings
    what = "full" if settings.lora_rank is None else f"LoRA rank {settings.lora_rank}"
    where = f"{sharding.gpus} x {request.card.label}, ZeRO-{sharding.stage}, offload {sharding.offload}"
    return f"{request.groups} group(s), {what}, {request.optimizer}, {where}"


def _table(title: str, rows: list[Row]) -> Any:
    from rich.table import Table

    from tuna.plan.comparison import plan_rows
    from tuna.plan.picture import NAMES

    table = Table("GiB on each GPU", title=title, title_justify="left")
    for row in rows:
        table.add_column(NAMES[row.method], justify="right")
    for label, cells in plan_rows(rows):
        table.add_row(label, *cells)
    return table


def _write(rows: list[Row], title: str, json_file: Path | None, picture: Path | None) -> None:
    from tuna.plan.picture import NAMES, draw_plans
    from tuna.system.writing import write_json

    if json_file is not None:
        write_json(json_file, {"title": title, "methods": [row.summary() for row in rows]})
    if picture is not None:
        draw_plans(picture, title, {NAMES[row.method]: row.plan for row in rows})
