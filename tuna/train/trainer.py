"""`TunaTrainer`: transformers' `Trainer` with the Tuna loss over packed trees.

Implemented here: batches (`tuna.data.batching`), the loss and its normalisation, evaluation, logged metrics.
The loop, schedules, checkpoints, callbacks, launchers and mixed precision are those of transformers' `Trainer`.

**Exact under accumulation.** A loss over groups, pairs and tokens is not a mean over micro-batches. So the
counts of all micro-batches of an optimizer step, on all ranks, are summed before the first of them runs
(`get_batch_samples` sees them all), every micro-batch is divided by these sums, and the division in transformers'
`Trainer` is switched off. Data-parallel wrappers average gradients over ranks, so the loss is multiplied by the number
of ranks.
"""

from __future__ import annotations

import functools
import itertools
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from tuna.data.batching import Batch, GroupBatchSampler, GroupLoader, group_loader
from tuna.data.templates import save_template
from tuna.data.tokenization import TokenizedGroup
from tuna.data.vocabulary import check_vocabulary
from tuna.models.loading import compile_layers
from tuna.score.evaluation import PendingScores, in_dataset_order
from tuna.score.metrics import ScoredGroups, loss_parts, ranking_metrics
from tuna.train import resuming
from tuna.train.adamw_kahan import AdamWKahan
from tuna.train.config import TunaConfig
from tuna.train.durable import DurableTrainer
from tuna.train.finite import FiniteLoss
from tuna.train.group_data import GroupData, check_data, tokenized
from tuna.train.memory_mode import MemoryMode
from tuna.train.meters import TrainingMeter
from tuna_kernels import LossCounts, RankingLossOutput
from tuna_kernels.integrations.transformers import (
    model_ranking_loss,
    prepare_model,
    score_groups,
    two_phase_ranking_loss,
)
from tuna_kernels.integrations.transformers.ranking_model import Carrier, ModelRequest


class TunaTrainer(DurableTrainer):
    """Trains a causal language model to rank responses; see `tuna.train.config.TunaConfig` for every setting.

    Groups may have different numbers of responses. A group of one response has no pairs and trains on its
    likelihood alone: that is supervised fine-tuning.

    Args:
        model: a causal language model of transformers, or a `peft` model around one. It is prepared for trees
            (`tuna_kernels.integrations.transformers.models.prepare_model`) and keeps working as before otherwise.
        args: the settings.
        train_dataset: tokenised groups, or records (also as a `datasets.Dataset` or rows of any format that
            `read_records` knows), which are tokenised with `processing_class` by `args.template`,
            `args.max_length` and `args.on_bad`.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer; saved with the model.
        callbacks: as for `transformers.Trainer`.
        optimizers: optimizer and schedule, as for `transformers.Trainer`.

    Raises:
        ValueError: DataParallel (several GPUs in one process), an empty dataset, tokens without an embedding in the
            model, a model or a setting that cannot be trained exactly on trees.
        TypeError: `args` is not a `TunaConfig`, or a dataset has elements of another type.
    """

    args: TunaConfig
    sources: dict[str, Any]  # sources of model and data by name, for errors about another run's checkpoint
    # Losses are normalised over the whole optimizer step: no division by the number of micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TunaConfig,
        train_dataset: GroupData | None = None,
        eval_dataset: GroupData | Mapping[str, GroupData] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if not isinstance(args, TunaConfig):
            raise TypeError(f"args must be a TunaConfig, got {type(args).__name__}")

        def tokenize(data: Any) -> Any:
            return None if data is None else tokenized(data, args=args, tokenizer=processing_class)

        train = tokenize(train_dataset)
        evaluation = (
            {name: tokenize(data) for name, data in eval_dataset.items()}
            if isinstance(eval_dataset, Mapping)
            else tokenize(eval_dataset)
        )
        check_data(model, train, evaluation, args, processing_class)
        model = prepare_model(model, attention=args.tree_attention)
        if args.compile_options is not None:
            compile_layers(model, args.compile_options)
        config: Any = model.config
        use_cache = config.use_cache
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.deepspeed and optimizers != (None, None):
            raise ValueError("optimizers is not supported under DeepSpeed: set optim, or an optimizer in its settings")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process means DataParallel, which cannot split a packed tree: "
                "start one process per GPU with torchrun, or choose one GPU with CUDA_VISIBLE_DEVICES"
            )
        # transformers' `Trainer` would disable the cache permanently, also for generation with the saved model.
        # Passes over a tree never use it.
        config.use_cache = use_cache
        # The equivalent for versions of transformers without loss_is_scaled_for_ga.
        self.model_accepts_loss_kwargs = True
        self.meter = TrainingMeter()
        self.memory_mode = MemoryMode(model, args)
        self.finite = FiniteLoss(wish=lambda: self.stop.received is not None)
        self.sources: dict[str, Any] = {}

    # Data

    def get_train_dataloader(self) -> GroupLoader:
        """Shuffled micro-batches of this rank."""
        if not self.train_dataset:
            raise ValueError("train_dataset is empty or missing: there is nothing to train on")
        return self._loader(cast(Any, self.train_dataset), self._train_batch_size, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> GroupLoader:
        """This rank's share of an evaluation set, given as groups or by name; default: the only one."""
        dataset = self._evaluation_set(eval_dataset)
        return self._loader(dataset, self.args.per_device_eval_batch_size, shuffle=False)

    def _evaluation_set(self, dataset: Any = None) -> Any:
        """An evaluation set given directly or by name; default: the only one (or a mapping of all)."""
        known: Any = self.eval_dataset
        if isinstance(dataset, str):
            return known[dataset]
        return known if dataset is None else dataset

    def _loader(self, dataset: Sequence[TokenizedGroup], groups: int, *, shuffle: bool) -> GroupLoader:
        args, share = self.args, self.args.share
        sampler = GroupBatchSampler(
            [item.group for item in dataset],
            groups_per_batch=groups if args.tokens_per_batch is None else None,
            tokens_per_batch=args.tokens_per_batch,
            shuffle=shuffle,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            share=share,
            lone_groups=not shuffle,  # a training step must not exceed its memory unasked; evaluation may
        )
        return group_loader(dataset, sampler, share=share, num_workers=args.dataloader_num_workers)

    # One optimizer step

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """The optimizers of transformers' `Trainer`, and `AdamWKahan`."""
        if not args.kahan:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        names = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return AdamWKahan, {"lr": args.learning_rate, **names}

    def get_batch_samples(  # type: ignore[override]  # the count of items is a LossCounts
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], LossCounts]:
        """This rank's micro-batches of an optimizer step, and the counts that normalise the whole step's loss."""
        if self.state.global_step >= self.state.max_steps:  # resumed at its last step: transformers would add one
            self.control.should_training_stop = True
            return [], LossCounts(0, (), 0)
        self.meter.start_step()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.finite.start_step(len(batches))
        mine = [batch["tree"].loss_counts() for batch in batches if batch["counted"]]
        counts = functools.reduce(operator.add, mine, LossCounts(0, (), 0))
        states_made = bool(getattr(self.optimizer, "state", None))
        wishes = [self.memory_mode.wants_two_phase(batch["tree"], states_made=states_made) for batch in batches]
        all_counts, all_wishes = zip(*gather_object([(counts, wishes)]), strict=True)
        for batch, *wanted in zip(batches, *all_wishes, strict=True):  # ranks run in lockstep, so in one mode
            batch["two_phase"] = any(wanted)
        return batches, functools.reduce(operator.add, all_counts)

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        """Move a batch; transformers' version casts floating-point inputs under DeepSpeed."""
        tree = inputs["tree"].to(self.args.device)
        return Batch({**inputs, "input_ids": tree.input_ids, "tree": tree})

    def compute_loss(  # type: ignore[override]  # a batch is a Batch, its count a LossCounts
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: LossCounts | None = None,
    ) -> Tensor | tuple[Tensor, RankingLossOutput]:
        """This micro-batch's share of the optimizer step's loss, times the number of ranks."""
        counted = inputs["counted"]
        counts = num_items_in_batch if counted else None
        output = model_ranking_loss(self._carrier(model), inputs["tree"], counts=counts, **self._loss_settings())
        self.finite.add(output.loss, inputs["ids"], self.state.global_step + 1)
        if counted:
            self.meter.add(inputs, output)
        loss = output.loss * (self.accelerator.num_processes if counted else 0)
        return (loss, output) if return_outputs else loss

    def training_step(  # type: ignore[override]  # a batch is a Batch, its count a LossCounts
        self, model: nn.Module, inputs: Batch, num_items_in_batch: LossCounts | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, in one pass or two phases; returns the loss as `compute_loss`."""
        if not inputs.get("two_phase", False):
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[arg-type]
        model.train()
        inputs = self._prepare_inputs(inputs)
        counted = inputs["counted"]
        factor = self.accelerator.num_processes if counted else 0
        output = two_phase_ranking_loss(
            self._carrier(model),
            inputs["tree"],
            counts=num_items_in_batch if counted else None,
            candidates_per_pass=self.args.candidates_per_pass,
            skip_inactive=self.args.skip_inactive,
            scale=factor,
            backward=self._backward_of_a_pass,
            pass_context=functools.partial(self._context_of_a_pass, model),
            before_backward=lambda scored: self.finite.add(scored.loss, inputs["ids"], self.state.global_step + 1),
            most_passes=lambda passes: max(gather_object([passes])),
            **self._loss_settings(),
        )
        self.memory_mode.add(inputs["tree"], output)
        if counted:
            self.meter.add(inputs, output)
        return output.loss * factor

    def _backward_of_a_pass(self, loss: Tensor, last: bool) -> None:
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Direct call to the engine's wrapper, which steps when gradients are synchronised: after the last pass.
            last = last and accelerator.sync_gradients
            accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last, scale_wrt_gas=False)
        else:
            accelerator.backward(loss)

    def _context_of_a_pass(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """DDP reduces gradients once, after the last pass; FSDP after each, which keeps them sharded."""
        if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def _loss_settings(self) -> dict[str, Any]:
        names = ("preset", "margin", "length_penalty", "mle_weight", "logits_budget", "backend")
        return {name: getattr(self.args, name) for name in names}

    def _carrier(self, model: nn.Module) -> Carrier:
        """A function that runs requests on the bare model through the wrappers around it.

        Wrappers (DDP, DeepSpeed, FSDP) set up gradient reduction and gather parameters when they are called, so a
        request replaces the model's forward. A `RankingModel` around the model would do the same, but transformers'
        `Trainer` saves, resumes and unwraps the model it was given, which must be the language model itself.
        """
        bare = self.accelerator.unwrap_model(model)

        def forward(request: ModelRequest) -> tuple[Tensor, ...]:
            with self.accelerator.autocast():
                return request(bare)

        def carry(request: ModelRequest) -> tuple[Tensor, ...]:
            with _forward_replaced(bare, forward):  # also without a wrapper: FSDP2 turns the model itself into one
                return cast(tuple[Tensor, ...], model(request))

        return carry

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss parts and ranking metrics (`tuna.score.metrics`) of a dataset, over all its groups as one batch.

        Args:
            eval_dataset: groups, records, the name of an evaluation set, or several by name; default: all.
            ignore_keys: not used.
            metric_key_prefix: prefix of every metric, as in `eval_loss` and `eval_rank/accuracy`.
        """
        data = self._evaluation_set(eval_dataset)
        if isinstance(data, Mapping):
            parts = [self.evaluate(data[k], ignore_keys, f"{metric_key_prefix}_{k}") for k in data]
            return functools.reduce(operator.or_, parts)
        start, args = time.time(), self.args
        scored = self.score(data)
        loss = loss_parts(scored, preset=args.preset, margin=args.margin, mle_weight=args.mle_weight)
        values = {
            "loss": loss.loss,
            "loss/rank": loss.ranking,
            "loss/mle": loss.mle,
            **ranking_metrics(scored),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics |= cast(Any, speed_metrics)(metric_key_prefix, start, num_samples=scored.num_groups)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def score(self, dataset: Any) -> ScoredGroups:
        """Scores of all groups of a dataset, in its order, the same on every rank; all ranks must call it."""
        dataset = self._evaluation_set(dataset)
        if not dataset:
            raise ValueError("eval_dataset is empty or missing: there is nothing to evaluate")
        groups = tokenized(dataset, self.args, cast(Any, self.processing_class))
        check_vocabulary(cast(Any, self.model), groups, cast(Any, self.processing_class))
        loader = self.get_eval_dataloader(groups)
        self.callback_handler.eval_dataloader = loader
        settings: Any = {"length_penalty": self.args.length_penalty, "backend": self.args.backend}
        model, mine = self.model_wrapped, []
        model.eval()
        for batch in map(self._prepare_inputs, loader):
            with torch.no_grad():
                result = score_groups(self._carrier(model), batch["tree"], **settings)
            if batch["counted"]:
                mine.append(PendingScores.of(batch["tree"], result.scores, result.logprobs).fetch())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sampler = cast(GroupBatchSampler, loader.batch_sampler)
        plan, world = sampler.plan(), sampler.world_size
        by_rank = [[row for row in plan[rank::world] if row] for rank in range(world)]
        return in_dataset_order(gather_object(mine), list(itertools.chain.from_iterable(by_rank)))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: a tree has no labels to predict. Use `score` for the model's scores of responses."""
        raise TypeError("TunaTrainer has no predict: use score(dataset) or evaluate(dataset)")

    # Resuming and stopping

    def settings(self) -> dict[str, Any]:
        """The settings of the base class, and descriptions of data and model."""
        found = super().settings() | resuming.describe_model(cast(nn.Module, self.model))
        if self.args.kahan:
            found["optim"] = "adamw_kahan"
        return found | {"data": resuming.describe_data(cast(Any, self.train_dataset) or (), self.sources)}

    def _stop_agreed(self) -> bool:
        """A single process knows at once; ranks share it with their losses (`tuna.train.finite`)."""
        return self.finite.wished if self.accelerator.num_processes > 1 else super()._stop_agreed()

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        save_template(output_dir or str(self.args.output_dir), self.args.template)

    # Logging

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `DurableTrainer.train`."""
        self.meter = TrainingMeter()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; lines of the training loop also get the meter's figures."""
        if "loss" in logs:
            logs |= self.meter.flush() | self.memory_mode.flush()
        super().log(logs, start_time)


@contextmanager
def _forward_replaced(module: nn.Module, function: Callable[[ModelRequest], Any]) -> Iterator[None]:
    """Make the wrappers around `module` run `function` instead of its forward, for one call.

    While `function` runs, the module has its own forward again.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own

    def instead(request: ModelRequest) -> Any:
        restore()
        return function(request)

    module.forward = instead
    try:
        yield
    finally:
        restore()
