"""The trainer that routers and experts share: a ``transformers.Trainer`` over answer tokens."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from xlora_core.config.training import TrainConfig
from xlora_core.errors import ConfigError, ModelError
from xlora_core.training.checkpoints import SafeCheckpoints, checkpoint_to_resume, trainable
from xlora_core.training.data import IGNORE, Example, by_length, collate, step_order
from xlora_core.training.interruption import Interruption
from xlora_core.training.log import TrainingLog, log_of_history
from xlora_core.training.losses import token_weights
from xlora_core.training.metrics import RoutingSums
from xlora_core.training.progress import Progress

_FLOOR = 0.05  # the cosine ends at this share of the peak


@dataclass(kw_only=True)
class AnswerPass:
    """What a forward pass yields on the N answer tokens of a batch.

    Attributes:
        losses: ``[N]``, nats, with gradient.
        domains: Index of each answer token's domain, int64 ``[N]``.
        scalings: ``[N, L, K]`` that wrote each token, with gradient; None without a router.
    """

    losses: Tensor
    domains: Tensor
    scalings: Tensor | None = None


class AnswerTrainer(SafeCheckpoints):
    """Trains what requires a gradient, with a loss on the answer tokens only.

    Rows of similar length make a step, in an order that the seed alone fixes, so that a resumed
    run sees what the whole one would have seen.

    Args:
        model: The model; trained in place.
        pad_id: Token id to pad with.
        train: Training examples.
        heldout: Held-out examples, for the curve; may be empty.
        folder: Folder of the checkpoints.
        settings: How to train.
        run: What makes the run what it is, as of ``run_identity``.
        domains: The adapters' names, the first domains of the index; others follow.
        progress: Shows how it gets on.

    Raises:
        ConfigError: If nothing in the model can be trained, there are too few examples, or the
            folder holds a checkpoint of another run.
    """

    loss_is_scaled_for_ga = True  # the weights of a step's tokens sum to 1

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        train: Sequence[Example],
        heldout: Sequence[Example],
        folder: Path,
        settings: TrainConfig,
        *,
        run: Mapping[str, Any],
        domains: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        parameters = list(trainable(model).values())
        if not parameters:
            raise ConfigError("no parameter of the model requires a gradient, nothing can learn")
        self.settings = settings
        self.progress = progress or Progress()
        self.checkpoint = checkpoint_to_resume(folder, run)
        self.heldout_batches = by_length(heldout, settings.rows)
        self.domain_names = {name: index for index, name in enumerate(domains)}
        for name in sorted({d for e in (*train, *heldout) for d in e.domains if d}):
            self.domain_names.setdefault(name, len(self.domain_names))
        self.domain_names[""] = len(self.domain_names)  # answers whose row names none
        # Of similar length within a step; a step's forward passes share them out.
        per_step = settings.rows * settings.accumulation
        steps = step_order([len(e) for e in train], per_step, settings.steps, seed=settings.seed)
        self.order = [
            step[i : i + settings.rows] for step in steps for i in range(0, per_step, settings.rows)
        ]
        self._parts: dict[str, float] = {}
        self._pad_id = pad_id
        self._clock = _StepClock()
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, functools.partial(learning_rate_share, settings=settings)
        )
        super().__init__(
            run=run,
            model=model,
            args=_arguments(
                model,
                folder,
                settings,
                evaluates=bool(heldout),
                resumed=self.checkpoint is not None,
            ),
            data_collator=self.collated,
            train_dataset=list(train),
            eval_dataset=list(heldout) or None,
            optimizers=(optimizer, scheduler),
            callbacks=[self._clock, self.progress],
        )
        self.remove_callback(PrinterCallback)  # stdout is for a command's results

    def fit(self, *, command: str = "") -> TrainingLog:
        """Trains to the end, from the newest checkpoint of the folder if there is one.

        Ctrl-C ends the run after its step, with a checkpoint.

        Args:
            command: The command line, for the log.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.
            ModelError: If the loss is no longer finite.
            CheckpointError: If the checkpoint is damaged.
        """
        if self.checkpoint is not None:
            self.progress.note(f"goes on from {self.checkpoint.name}")
        with Interruption(self.progress) as interruption, _checkpointing(self.model, self.settings):
            self.add_callback(interruption)
            try:
                self.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            finally:
                self.remove_callback(Interruption)
                self.model.eval()
        if interruption.requested and self.state.global_step < self.settings.steps:
            self.progress.note(
                f"stopped at step {self.state.global_step} of {self.settings.steps}; "
                "the same command goes on from there"
            )
            raise KeyboardInterrupt
        return log_of_history(self.state.log_history, run=self.run, command=command)

    # ---------------------------------------------------------------- what children define

    @abstractmethod
    def answer_pass(self, inputs: Mapping[str, Tensor]) -> AnswerPass:
        """Runs the model on a batch.

        Args:
            inputs: ``input_ids``, ``attention_mask``, ``labels``, ``domains``; each ``[B, T]``.
        """

    def auxiliary_losses(
        self, answers: AnswerPass, weights: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """Returns the further losses that are on at the present step: name -> factor, scalar.

        Args:
            answers: The forward pass.
            weights: ``[N]``, each answer token's weight in the step; they sum to 1 over the step.
        """
        return {}

    # ---------------------------------------------------------------- data

    def collated(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pads examples to one batch; ``domains`` ``[B, T]`` are indices, right on answers only."""
        batch = collate(examples, self._pad_id)
        domains = batch.domain_indices(self.domain_names)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
            "domains": domains,
        }

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the batches of the whole run, in the planned order."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]  # any sequence serves a DataLoader
            batch_sampler=self.order,
            collate_fn=self.collated,
            generator=torch.Generator(),  # else it would draw from the global one
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Returns the batches of one step, with the weight of each answer token in its loss."""
        batches = list(islice(epoch_iterator, num_batches))
        kept = [_at_answers(batch["labels"], batch["domains"]) for batch in batches]
        balanced = bool(getattr(self.settings, "balanced", False))
        for batch, weights in zip(batches, token_weights(kept, balanced=balanced), strict=True):
            batch["weights"] = weights
        return batches, None

    # ---------------------------------------------------------------- losses

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Returns bfloat16 autocast, if it is on; accelerate's would replace ``model.forward``."""
        stack = contextlib.ExitStack()
        device = self.args.device.type
        stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=self.settings.autocast))
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of one forward pass: its share of the step's."""
        weights = inputs.pop("weights")
        answers = self.answer_pass(inputs)
        loss = (answers.losses * weights).sum()
        parts = {"lm_loss": loss}
        for name, (factor, value) in self.auxiliary_losses(answers, weights).items():
            parts[f"auxiliary:{name}"] = value
            loss = loss + factor * value
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + float(value.detach())
        return (loss, answers) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "heldout",
    ) -> dict[str, float]:
        """Returns and logs the loss over all held-out answer tokens, and where the router looks.

        Figures of the router are named ``routing:<figure>``, as in ``RoutingSums.means``.
        """
        started = time.perf_counter()
        self.model.eval()
        losses: list[Tensor] = []
        sums = RoutingSums()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.heldout_batches:
                answers = self.answer_pass(self._prepare_inputs(self.collated(batch)))
                losses.append(answers.losses.float())
                if answers.scalings is not None:
                    sums.add(answers.scalings, answers.domains)
        metrics = {"heldout_loss": float(torch.cat(losses).mean())}
        if sums.tokens:
            means = sums.means(list(self.domain_names))
            metrics |= {f"routing:{name}": value for name, value in means.items()}
        self.log(metrics | {"heldout_seconds": time.perf_counter() - started})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0: the estimate would walk through all modules at each step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; to the loss of a step it adds its parts and its seconds.

        Raises:
            ModelError: If the loss is not finite.
        """
        if "loss" in logs:
            logs = logs | self._parts | {"seconds": self._clock.seconds}
            self._parts = {}
            if not math.isfinite(logs["loss"]):
                raise ModelError(
                    f"training diverged: the loss of step {self.state.global_step} is "
                    f"{logs['loss']}",
                    hint="try a lower learning rate, or a longer warm-up",
                )
        super().log(logs, start_time)


class _StepClock(TrainerCallback):
    """Seconds of the last optimiser step, without evaluation and checkpoints."""

    seconds = 0.0
    _started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.perf_counter() - self._started


def learning_rate_share(step: int, settings: TrainConfig) -> float:
    """Returns a step's share of the peak learning rate, from step 0: warm-up, then cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _arguments(
    model: nn.Module, folder: Path, settings: TrainConfig, *, evaluates: bool, resumed: bool
) -> TrainingArguments:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Trainer trains on the current one
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every,
        eval_on_start=evaluates and not resumed,
        save_strategy="steps",
        save_steps=settings.save_every or settings.eval_every,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=device.type == "cpu",
        use_cache=bool(getattr(getattr(model, "config", None), "use_cache", False)),
    )
    if arguments.world_size > 1:
        raise ConfigError(
            f"training runs in one process, this is one of {arguments.world_size}",
            hint="start it without torchrun",
        )
    if arguments.n_gpu > 1:  # several would each get a copy of the model and a slice of the rows
        arguments._n_gpu = 1  # noqa: SLF001  # as Trainer itself does for model parallelism
    return arguments


@contextlib.contextmanager
def _checkpointing(model: Any, settings: TrainConfig) -> Iterator[None]:
    """Turns gradient checkpointing on for the length of a ``with`` block, if it is wanted."""
    if settings.gradient_checkpointing == "off":
        yield
        return
    reentrant = settings.gradient_checkpointing == "reentrant"
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # a reentrant checkpoint has a gradient only if one of its inputs has
        model.enable_input_require_grads()
    try:
        yield
    finally:
        if reentrant:
            model.disable_input_require_grads()
        model.activation_checkpointing_disable()


def _at_answers(labels: Tensor, values: Tensor) -> Tensor:
    """Returns the values ``[N]`` of the answer tokens, in the order of ``answer_positions``."""
    return values[:, 1:][labels[:, 1:] != IGNORE]
