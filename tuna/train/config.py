"""`TunaConfig`: every setting of a training run, as Python fields, YAML keys and command-line flags alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from transformers import TrainingArguments

from tuna.data.problems import OnBad
from tuna.score.metrics import greater_is_better
from tuna.system.common_settings import HELP
from tuna.train import deepspeed
from tuna.train.distributed import prepare_ranks
from tuna.train.effects import check_effects, check_mappings
from tuna_kernels.losses import Preset
from tuna_kernels.tree import Share

Memory = Literal["auto", "one_pass", "two_phase"]


# kw_only: the field order of the parent is not ours, so nothing of ours may be given by position.
@dataclass(kw_only=True)
class TunaConfig(TrainingArguments):
    """Settings of `TunaTrainer`: `transformers.TrainingArguments` with the paper's defaults, and our own.

    Everything of the parent that is not named below works as documented there, except that
    **batch sizes count groups** (a prompt with its k responses), not sequences, and that
    settings that would have no effect, or a wrong one, are refused (`tuna.train.effects`; DataParallel among them).
    `torch_compile` compiles the decoder layers, one by one, around the attention over the tree.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the limit.

    Examples:
        >>> config = TunaConfig(output_dir="out", preset="released", use_cpu=True)
        >>> config.margin, config.learning_rate, config.lr_scheduler_type.value
        (0.1, 1e-05, 'cosine')
    """

    # Loss
    preset: Preset = field(
        default="paper", metadata={"help": "Form of the loss: the paper's, or that of the authors' released code."}
    )
    """'paper': sum over a group's pairs plus the likelihood of its best response, mean over groups. 'released': what
    the authors' code computes, means per rank difference plus the token mean of all candidates."""
    margin: float = field(default=0.1, metadata={"help": "Score gap per step of rank difference."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Exponent of the length in a score, sum(log p) / length ** length_penalty."}
    )
    mle_weight: float = field(
        default=1.0, metadata={"help": "Weight of the likelihood term; 0 trains on the ranking alone."}
    )

    # Data
    max_length: int = field(default=512, metadata={"help": HELP["max_length"]})
    template: str = field(
        default="none",
        metadata={
            "help": "Prompt template: none, chat, alpaca or a text with {prompt}; tuna train prefers a saved one."
        },
    )
    """'none' shows a prompt as it is, 'chat' by the model's chat template. Without the flag, `tuna train` takes the
    template that the model was trained with, if one was saved with it."""
    on_bad: OnBad = field(default="fail", metadata={"help": "Whether an unusable record stops the run or is skipped."})

    # Batches
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Groups per micro-batch and device, unless tokens_per_batch is given."}
    )
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Groups per evaluation batch and device."})
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Tree tokens per micro-batch and device: as many groups as fit."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    share: Share = field(
        default="tree",
        metadata={"help": "What the responses of a group compute once: common prefixes, the prompt, or nothing."},
    )
    """'tree' shares every common prefix. Scores and gradients are the same up to rounding."""

    # Kernels
    backend: str = field(default="auto", metadata={"help": "Kernel backend; tuna info lists the usable ones."})
    tree_attention: str = field(
        default="auto", metadata={"help": "Backend of the attention over the tree, as in tuna_kernels.tree_attention."}
    )
    logits_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes of logits that the loss keeps instead of recomputing; None leaves it to the kernels."},
    )

    # Memory
    memory: Memory = field(
        default="auto", metadata={"help": "Whether a micro-batch is computed in one pass or in two phases."}
    )
    """'one_pass': the graph of all candidates at once. 'two_phase': score without a graph, then `candidates_per_pass`
    at a time: less memory, one more forward. 'auto': two phases for micro-batches that would not fit in one pass."""
    candidates_per_pass: int = field(
        default=1, metadata={"help": "Two phases: candidates whose graph is alive at once."}
    )
    skip_inactive: bool = field(
        default=True, metadata={"help": "Two phases: leave out candidates that have no gradient, which is exact."}
    )

    # Resuming
    allow_changes: bool = field(
        default=False, metadata={"help": "Resume even if data, seed, loss or batches differ from the checkpoint's."}
    )
    """Groups may then come twice in an epoch, or not at all."""
    trust_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that may run code when it is loaded."}
    )
    """One that holds more than tensors and plain values."""

    # Optimizer
    kahan: bool = field(init=False, default=False)
    """Set by `optim="adamw_kahan"`: `adamw_kahan.AdamWKahan`, for bfloat16 weights without float32 masters."""

    compile_options: dict[str, Any] | None = field(init=False, default=None)
    """Set by `torch_compile` and its backend and mode: keywords of `torch.compile` for each decoder layer."""

    # Defaults of the paper, where they differ from the parent's
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    """The paper: 1e-5 probabilistic, 1e-6 contextual."""
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=2, metadata={"help": "Steps of linear warm-up; below 1, a fraction of all steps."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})

    # What our batches need of the parent
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: a batch is a tree, not columns."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay False: a non-finite loss stops the run (tuna.train.finite)."}
    )

    # The parent's own, which are flags of tuna train
    max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps to train for; above 0, they replace num_train_epochs."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the data order, the hold-out and new weights."})
    logging_steps: float = field(
        default=10, metadata={"help": "Optimizer steps between log lines; fewer in a short run of tuna train."}
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Optimizer steps between evaluations; below 1, a fraction of all steps."}
    )
    save_steps: float = field(
        default=500, metadata={"help": "Optimizer steps between checkpoints; below 1, a fraction of all steps."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for checkpoints and the trained model."})
    deepspeed: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "DeepSpeed settings, a JSON or YAML file."}
    )

    def __post_init__(self) -> None:
        self._check_ours()
        check_mappings(self)
        if self.optim == "adamw_kahan":  # a name that the parent does not know
            self.kahan, self.optim = True, "adamw_torch"
        compile_options = {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode}
        if self.torch_compile or any(compile_options.values()):
            self.compile_options = {name: value for name, value in compile_options.items() if value}
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if self.deepspeed:
            ours = deepspeed.read_settings(self.deepspeed)
            if self.compile_options is not None and deepspeed.stage_of(ours) == 3:
                raise ValueError("torch_compile is not supported under ZeRO-3: a layer gathers its weights as it runs")
            self.deepspeed = deepspeed.prepare(ours)
        ranks = prepare_ranks()
        if not torch.accelerator.is_available():
            # Left to itself, accelerate looks for a GPU: it would leave DeepSpeed out, let each rank train by itself,
            # and refuse bfloat16.
            self.use_cpu = True
        if self.ddp_backend is not None and ranks == 1:
            raise ValueError(f"ddp_backend = {self.ddp_backend!r} would have no effect: there is one process")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = greater_is_better(self.metric_for_best_model)
        super().__post_init__()  # type: ignore[no-untyped-call]
        if ranks > self.world_size:
            raise ValueError(
                f"{ranks} processes were started, but each counts {self.world_size} in all and would train by itself: "
                "start them with torchrun, and on a machine where ranks train on the CPU set use_cpu=true"
            )
        self._check_parents()

    @property
    def device(self) -> torch.device:
        """The device of this process; a CPU without its rank's number, with which torch cannot restore an optimizer."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found

    def _check_ours(self) -> None:
        _one_of("preset", self.preset, get_args(Preset))
        _one_of("share", self.share, get_args(Share))
        _one_of("memory", self.memory, get_args(Memory))
        _one_of("on_bad", self.on_bad, get_args(OnBad))
        for name in ("margin", "mle_weight", "learning_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)} must be a finite number, at least 0")
        if not -float("inf") < self.length_penalty < float("inf"):
            raise ValueError(f"length_penalty = {self.length_penalty} must be finite")
        if self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length} leaves no room for a prompt and a response token")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must be at least 0 and below 2**32")
        for name in ("logging_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value} must be above 0")
        for name in ("tokens_per_batch", "logits_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        for name in (
            "candidates_per_pass",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.template not in ("none", "chat", "alpaca") and "{prompt}" not in self.template:
            raise ValueError(
                f"template = {self.template!r} must be 'none', 'chat', 'alpaca' or a text that contains {{prompt}}"
            )

    def _check_parents(self) -> None:
        """Refuse what the parent takes and our batches would silently ignore."""
        refused = {
            "remove_unused_columns": (
                self.remove_unused_columns,
                "a batch is a packed tree, it has no columns",
            ),
            "logging_nan_inf_filter": (self.logging_nan_inf_filter, "a loss that is not finite stops the run"),
            "label_smoothing_factor": (self.label_smoothing_factor, "the Tuna loss has no smoothed form"),
            "neftune_noise_alpha": (
                self.neftune_noise_alpha,
                "its noise is scaled by the length of the input, here of all groups of a packed row, and a shared "
                "prompt would draw it once for all its responses",
            ),
            "dataloader_drop_last": (self.dataloader_drop_last, "every group is seen once per epoch"),
            "bf16_full_eval": (self.bf16_full_eval, "load the model in bfloat16 instead"),
            "fp16_full_eval": (self.fp16_full_eval, "load the model in float16 instead"),
            "debug": (self.debug, "its hooks compute with every value that goes through a layer, booleans too"),
            "parallelism_config": (self.parallelism_config, "ranks that share a batch would count it twice"),
        }
        for name, (value, reason) in refused.items():
            if value:
                raise ValueError(f"{name} = {value} is not supported: {reason}")
        if any(part in str(self.optim).lower() for part in ("8bit", "paged", "bnb")) and not find_spec("bitsandbytes"):
            raise ValueError(f"optim = {self.optim} needs a package that is missing: pip install bitsandbytes")
        updates_in_backward = any(part in str(self.optim).lower() for part in ("lomo", "layerwise"))
        if updates_in_backward and self.memory != "one_pass":
            raise ValueError(
                f"optim = {self.optim} updates weights during the backward, of which two phases take several: "
                f"memory = {self.memory!r} must then be 'one_pass'"
            )
        if self.compile_options is not None and self.fsdp:
            raise ValueError("torch_compile is not supported under FSDP: a layer gathers its weights as it runs")
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy = {self.train_sampling_strategy!r} is not supported: batches are "
                "planned by groups or by tokens_per_batch"
            )
        check_effects(self)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not one of {allowed}")
