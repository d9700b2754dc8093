"""`tuna plan`: what a training step takes and where it fits, before any GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from tuna.cli.flags import Flags
from tuna.cli.options import at_least

if TYPE_CHECKING:
    from rich.console import Console

    from tuna.plan.comparison import Row
    from tuna.plan.planner import Plan, Planner
    from tuna.plan.settings import PlanRequest
    from tuna.plan.workload import Workload

__all__ = ["plan"]

MODEL, DATA, STEP, MACHINE, OUTPUT = "Model", "Data", "Step", "Machine", "Output"
SETTINGS = "tuna.plan.settings"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Size: TypeAlias = int | None


def _flag(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def plan(
    context: typer.Context,
    *,
    model: Annotated[
        str | None, _flag(MODEL, "Model: a size such as llama-7b or llama3-8b, a hub name, a folder, or a config.json.")
    ] = None,
    vocab: Annotated[Size, at_least(1, "Vocabulary size of a Llama given by its sizes.", panel=MODEL)] = None,
    hidden: Annotated[Size, at_least(1, "Hidden size of that Llama.", panel=MODEL)] = None,
    ffn: Annotated[Size, at_least(1, "Intermediate size of its MLP.", panel=MODEL)] = None,
    layers: Annotated[Size, at_least(1, "Number of its layers.", panel=MODEL)] = None,
    heads: Annotated[Size, at_least(1, "Number of its attention heads.", panel=MODEL)] = None,
    kv_heads: Annotated[Size, at_least(1, "Number of its key-value heads.", panel=MODEL)] = None,
    lengths: Annotated[
        dict[str, Any],
        Flags("tuna.plan.workload:Workload", "k=responses prompt=prompt_tokens response=response_tokens", panel=DATA),
    ],
    data: Annotated[str | None, _flag(DATA, "Ranked records whose lengths are used instead.")] = None,
    tokenizer: Annotated[str | None, _flag(DATA, "Tokenizer for --data, if not that of --model.")] = None,
    template: Annotated[str | None, _flag(DATA, "Prompt template for --data, as in tuna train.")] = None,
    max_length: Annotated[
        int, at_least(2, "Maximum length of prompt plus response for --data, in tokens.", panel=DATA)
    ] = 512,
    batch: Annotated[dict[str, Any], Flags(f"{SETTINGS}:PlanRequest", "groups optimizer", panel=STEP)],
    step: Annotated[
        dict[str, Any],
        Flags(f"{SETTINGS}:StepSettings", "method lora-r=lora_rank checkpointing candidates_per_pass", panel=STEP),
    ],
    precision: Annotated[Literal["bf16", "fp16", "fp32"], _flag(STEP, "Dtype of weights and activations.")] = "bf16",
    most_groups: Annotated[int, at_least(1, "Largest micro-batch to try, in groups.", panel=STEP)] = 128,
    gpu: Annotated[
        str, _flag(MACHINE, "Name of the GPU, such as rtx3090, v100, a100-40, l40s, a100-80, h100-80 or b200-192.")
    ] = "a100-80",
    sharding: Annotated[
        dict[str, Any],
        Flags(f"{SETTINGS}:Sharding", "gpus gpus_per_node zero=stage offload", panel=MACHINE, defaults={"stage": None}),
    ],
    host_memory: Annotated[float | None, at_least(0, "Host memory per node, in GiB.", panel=MACHINE)] = None,
    json_file: Annotated[Path | None, _flag(OUTPUT, "Write the figures to this file.", "--json")] = None,
    picture: Annotated[Path | None, _flag(OUTPUT, "Plot the memory of a GPU to this .png file.")] = None,
) -> None:
    """Predict the memory and time of a training step, and on how few GPUs it fits, without a GPU or weights.

    If the requested plan does not fit, fails with the reason and shows the nearest plan that fits.
    """
    import torch

    from tuna.cli.messages import refuse_given
    from tuna.console.terminal import Terminal
    from tuna.plan.cards import find_card
    from tuna.plan.planner import GIB, Planner
    from tuna.plan.settings import PlanRequest, Sharding, StepSettings
    from tuna.plan.simulate import Simulator
    from tuna.plan.sizes import explicit_config, model_config
    from tuna.plan.workload import Workload
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
        refuse_given(context, "it needs --data", "tokenizer", "template", "max_length")
    else:
        refuse_given(context, "--data decides it", *lengths)
    if (model is None) == all(value is None for value in sizes.values()):
        raise ValueError("give --model, or the sizes of a model (--vocab --hidden --ffn --layers --heads)")
    config = explicit_config(**sizes) if model is None else model_config(model)
    workload = Workload(**lengths) if data is None else _workload_of(data, tokenizer or model, template, max_length)
    lowest = sharding["stage"] is None
    if lowest:
        sharding["stage"] = {"none": 0, "optimizer": 2}.get(sharding["offload"], 3)
    request = PlanRequest(
        card=find_card(gpu),
        workload=workload,
        settings=StepSettings(dtype=getattr(torch, DTYPES[precision]), **step),
        sharding=Sharding(**sharding),
        host_memory=None if host_memory is None else int(host_memory * GIB),
        **batch,
    )
    planner = Planner(Simulator(config))
    if lowest:
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


def _workload_of(data: str, tokenizer: str | None, template: str | None, max_length: int) -> Workload:
    from tuna.plan.workload import Workload

    if tokenizer is None:
        raise ValueError("--data needs --tokenizer, or a --model that has one")
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
        raise ValueError(f"data = {data!r} has no usable record")
    return Workload(groups=tuple(item.group for item in groups))


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
