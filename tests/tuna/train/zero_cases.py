"""The table of cases that the distributed tests run, and what runs them: `python -m tests.tuna.train.zero_cases`.

A case is a model, settings of `TunaConfig` and settings of DeepSpeed. `run` trains it in this process (one rank
of a launcher, or alone) and leaves the weights after every step and the log. Starting ranks takes seconds, so
many cases run in one start. A case's reference is the same case alone, without DeepSpeed, with the whole step in
one micro-batch; see `alone`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tuna.data.records import read_records
from tuna.data.tokenization import TokenizedGroup, tokenize_records
from tuna.models.loading import load_tokenizer
from tuna.train.config import TunaConfig
from tuna.train.distributed import end_ranks
from tuna.train.trainer import TunaTrainer
from tuna_kernels import Group

VOCABULARY = 1024  # that of the tiny tokenizer
MAX_LENGTH = 160
WATCHDOG = 240  # seconds a case may take before the rank prints where it hangs and exits
EXAMPLES = Path(__file__).parents[3] / "tuna" / "data" / "examples" / "ranked_demo.jsonl"


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        zero: the ``zero_optimization`` section, None for a run without DeepSpeed.
        lora: layers with an adapter, by comma; "" for all weights.
        tied: input and output embeddings are one parameter.
        optimizer: one of `OPTIMIZERS`.
        settings: of `TunaConfig`, beside `COMMON`.
        deepspeed: further DeepSpeed settings.
        groups: groups of the data set used.
        lengths: "real", or "uneven": every second group is some tokens long, every seventh very long.
        alone: settings of the reference in one process, where they differ.
    """

    zero: Mapping[str, Any] | None = None
    lora: str = ""
    tied: bool = False
    optimizer: str = "sgd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    groups: int = 14
    lengths: str = "real"
    alone: Mapping[str, Any] = field(default_factory=dict)


COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0.0,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optim": "sgd", "learning_rate": 0.5},  # a step shows the gradient
    # An epsilon so large that a rounding of a gradient stays a rounding of the step.
    "adam": {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-3},
}

# Small tensors kept whole would hide what goes wrong with sharded ones.
SHARDED = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
STAGES: dict[int, dict[str, Any]] = {
    1: {"stage": 1, "overlap_comm": False},
    2: {"stage": 2, "overlap_comm": False},
    3: SHARDED,
}
CPU = {"device": "cpu"}
TORCH_ADAM = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}}
}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
# A margin at which some candidates have no gradient, so that ranks have different numbers of passes.
# Small steps: three large ones would magnify the roundings of the first.
TWO_PHASE = {
    "memory": "two_phase",
    "candidates_per_pass": 2,
    "margin": 0.01,
    "mle_weight": 0.5,
    "learning_rate": 0.05,
}
ONE_PASS = {"memory": "one_pass"}
# A few tokens have steep gradients: smaller steps, or roundings grow from step to step.
WHOLE_EPOCH = {"max_steps": -1, "num_train_epochs": 1.0, "learning_rate": 0.05}
# Half the accumulation on twice the ranks: steps hold the same rows.
BY_TOKENS = {"tokens_per_batch": 600, "gradient_accumulation_steps": 2, **WHOLE_EPOCH}
BY_TOKENS_ALONE = {"tokens_per_batch": 600, "gradient_accumulation_steps": 4}

CASES: dict[str, Case] = {
    **{f"zero{stage}": Case(STAGES[stage]) for stage in (1, 2, 3)},
    **{f"zero{stage}-adam-tied": Case(STAGES[stage], optimizer="adam", tied=True) for stage in (1, 2, 3)},
    **{
        f"zero{stage}-offload": Case(
            {**STAGES[stage], "offload_optimizer": CPU}, deepspeed=TORCH_ADAM, optimizer="adam"
        )
        for stage in (1, 2, 3)
    },
    "zero3-offload-all": Case(
        {**SHARDED, "offload_optimizer": CPU, "offload_param": CPU}, deepspeed=TORCH_ADAM, optimizer="adam"
    ),
    "zero2-checkpointing": Case(STAGES[2], settings=CHECKPOINTED),
    "zero3-checkpointing": Case(SHARDED, settings=CHECKPOINTED),
    **{f"zero{stage}-lora": Case(STAGES[stage], lora="q_proj,v_proj", settings=CHECKPOINTED) for stage in (1, 2, 3)},
    "zero3-lora-head": Case(SHARDED, lora="q_proj,lm_head"),
    "zero2-clipping": Case(STAGES[2], settings={"max_grad_norm": 0.05}),
    "zero3-clipping": Case(SHARDED, settings={"max_grad_norm": 0.05}),
    # What ranks get is as unlike as can be: each must still take part in every collective.
    "zero2-tokens": Case(STAGES[2], settings=BY_TOKENS, alone=BY_TOKENS_ALONE, lengths="uneven", groups=84),
    "zero3-tokens": Case(SHARDED, settings=BY_TOKENS, alone=BY_TOKENS_ALONE, lengths="uneven", groups=84),
    "zero3-uneven": Case(SHARDED, settings={**WHOLE_EPOCH, "per_device_train_batch_size": 1}, lengths="uneven"),
    "zero3-one-group": Case(SHARDED, settings=WHOLE_EPOCH, groups=1),
    "zero3-last-step": Case(SHARDED, settings=WHOLE_EPOCH, groups=9),
    "zero3-released": Case(SHARDED, settings={"preset": "released"}),
    **{f"zero{stage}-two-phase": Case(STAGES[stage], settings=TWO_PHASE, alone=ONE_PASS) for stage in (1, 2, 3)},
    "zero3-two-phase-tied-checkpointing": Case(
        SHARDED,
        tied=True,
        optimizer="adam",
        settings={**TWO_PHASE, **CHECKPOINTED, "learning_rate": 1e-2},
        alone=ONE_PASS,
    ),
    "zero3-two-phase-lora": Case(SHARDED, lora="q_proj,v_proj,lm_head", settings=TWO_PHASE, alone=ONE_PASS),
    "zero2-two-phase-offload": Case(
        {**STAGES[2], "offload_optimizer": CPU},
        deepspeed=TORCH_ADAM,
        optimizer="adam",
        settings={**TWO_PHASE, "learning_rate": 1e-2, "gradient_accumulation_steps": 1},
        alone=ONE_PASS,
    ),
}


def uneven(number: int) -> list[TokenizedGroup]:
    """Groups of 4 to 600 tokens, one to four responses: lengths that differ a hundredfold."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> Any:
        return rng.integers(3, VOCABULARY, length)

    return [
        TokenizedGroup(
            str(i),
            Group(
                tokens(2 + i % 3),
                [tokens(140 if i % 7 == 1 else 1 + j) for j in range(1 + i % 4)],
                ranks=range(1 + i % 4),
            ),
            0,
        )
        for i in range(number)
    ]


def data(number: int) -> list[TokenizedGroup]:
    """The first groups of the real ranked data where they are, else of the examples shipped."""
    shared = Path(os.environ.get("TUNA_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data")
    real = shared / "alpaca_eval_ranked.jsonl"
    records = read_records(real if real.is_file() else EXAMPLES).records[: 4 * number]
    groups, _ = tokenize_records(records, load_tokenizer("tiny"), template="none", max_length=MAX_LENGTH, on_bad="skip")
    return groups[:number]


def model(case: Case, seed: int = 0) -> nn.Module:
    """A random Llama of some 100,000 parameters; with an adapter that is not zero where the case says so."""
    torch.manual_seed(seed)
    net: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            tie_word_embeddings=case.tied,
        )
    )
    if case.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=case.lora.split(","), init_lora_weights=False, task_type="CAUSAL_LM")
        net = get_peft_model(net, config)
    return net


def deepspeed_settings(case: Case) -> dict[str, Any]:
    """The case's DeepSpeed settings, whole."""
    return {
        "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True, **(case.zero or {})},
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.deepspeed,
    }


def trainer(case: Case, folder: Path, alone: bool, seed: int = 0) -> TunaTrainer:
    """The case's trainer, under DeepSpeed unless ``alone``."""
    args = {**COMMON, **OPTIMIZERS[case.optimizer], **case.settings, "output_dir": str(folder), "use_cpu": True}
    if alone:
        groups = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * 2
        args |= {"per_device_train_batch_size": groups, "gradient_accumulation_steps": 1, **case.alone}
    elif case.zero is not None:
        args["deepspeed"] = deepspeed_settings(case)
    config = TunaConfig(**args)
    net = model(case, seed)
    groups = data(case.groups) if case.lengths == "real" else uneven(case.groups)
    return TunaTrainer(net, config, groups, groups[:5])


class KeepWeights(TrainerCallback):
    """The weights after every step, whole, in float64."""

    def __init__(self, owner: TunaTrainer) -> None:
        self.owner = owner
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(whole_weights(self.owner))


def whole_weights(owner: TunaTrainer) -> dict[str, torch.Tensor]:
    """All weights of the model as trained so far, gathered; empty on ranks other than the first."""
    state = owner.accelerator.get_state_dict(owner.model_wrapped) or {}
    return {name: value.detach().cpu().double() for name, value in state.items()}


def run(name: str, case: Case, folder: Path, alone: bool) -> None:
    """Train the case and write ``NAME.pt``: weights by step, log, evaluation, and by what."""
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    one = trainer(case, folder / name, alone)
    keep = KeepWeights(one)
    one.add_callback(keep)
    one.train()
    wrapper = type(one.model_wrapped).__name__
    start = {name: value.double() for name, value in model(case).state_dict().items()}
    evaluation = one.evaluate()
    if one.is_world_process_zero():
        result = {
            "start": start,
            "steps": keep.steps,
            "log": one.state.log_history,
            "evaluation": evaluation,
            "wrapper": wrapper,
        }
        torch.save(result, folder / f"{name}.pt")
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    """``python -m tests.tuna.train.zero_cases FOLDER NAME…``: ranks of a launcher, or alone without one."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    alone = "RANK" not in os.environ
    for name in names:
        run(name, CASES[name], folder, alone)
    end_ranks()
    print(json.dumps(names))


if __name__ == "__main__":
    main()
