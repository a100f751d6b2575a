"""The engine: one thread owns the model, many callers share it through a bounded queue."""

from __future__ import annotations

import atexit
import threading
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import identity
from xlora_core.engine.faults import closed_error
from xlora_core.engine.handle import EventStream, RequestHandle
from xlora_core.engine.overlap import OVERLAP_MODES, Overlap, OverlapMode
from xlora_core.engine.prompts import Prompt, encode_prompt
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.runner import Runner
from xlora_core.engine.scheduler import Scheduler
from xlora_core.engine.turns import TurnRunner
from xlora_core.errors import ConfigError, EngineError, ModelError, QueueFullError
from xlora_core.recording import RunHeader
from xlora_core.rows import opening

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel
    from xlora_core.recording import Run

_DEFAULT_ARMS = (Arm.routed(),)


class Engine:
    """Answers prompts with an X-LoRA model, many requests at a time, first come first served.

    A daemon thread owns the model; every method here may be called by any thread. All arms of all
    running requests share one run over the weights per token, where the base model allows it
    (``open_rows`` says why not); otherwise they take turns. A request that fails does so alone.
    Use it as a context manager, or call ``close``.

    Args:
        model: The model; put in evaluation mode. Nobody else should change it meanwhile; its
            adapters cannot be edited until the engine is closed.
        tokenizer: The Hugging Face tokenizer of its base model.
        max_queue: Most requests that wait, beside those that run; >= 1.
        max_active: Most requests that run at the same time; >= 1.
        overlap: Whether the scalings of the next token are fetched ahead, for a guess of what it
            will be: ``"auto"`` when that was found to pay. No result depends on it.
        n_guesses: Guesses of the next token that are read at once; >= 1. More are right more
            often, and pay where rows are nearly free.
        batched: False lets arms and requests take turns in any case.
        model_id: Name of the model for run files; the base model's path if empty.

    Raises:
        ConfigError: If an option is out of range.
        ModelError: If the base model is an encoder-decoder, or writes no text.

    Example:
        >>> engine = Engine(model, tokenizer)                                # doctest: +SKIP
        >>> engine.run("What is 2 + 2?", arms=[Arm.routed(), Arm.merged()])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: XLoraModel,
        tokenizer: Any,
        *,
        max_queue: int = 8,
        max_active: int = 8,
        overlap: OverlapMode = "auto",
        n_guesses: int = 1,
        batched: bool = True,
        model_id: str = "",
    ) -> None:
        for name, value in (
            ("max_queue", max_queue),
            ("max_active", max_active),
            ("n_guesses", n_guesses),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
        if overlap not in OVERLAP_MODES:
            raise ConfigError(f"overlap must be one of {', '.join(OVERLAP_MODES)}, got {overlap!r}")
        _check_serves(model)
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._max_queue = max_queue
        self._max_active = max_active
        self._model_id = model_id or str(getattr(model.config, "name_or_path", ""))
        self._context_length = model.context_length
        self._vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._stop_ids = stop_token_ids(model, tokenizer)
        self._base_hash = identity.base_fingerprint(model)
        self._adapter_hashes = identity.adapter_fingerprints(model)
        self._overlap = Overlap(overlap, n_guesses)
        self._scheduler = Scheduler(
            self._runner(batched=batched),
            tokenizer,
            stop_ids=self._stop_ids,
            context_length=self._context_length,
        )
        self._queue: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # Tokenizers are read-only in use, but their settings are checked per call.
        self._tokenizer_lock = threading.Lock()
        model.edit_guard.hold()
        self._thread = threading.Thread(target=self._work, name="xlora-engine", daemon=True)
        self._thread.start()
        # A process that ends while PyTorch computes in a daemon thread aborts.
        atexit.register(self.close)

    # ---------------------------------------------------------------- asking

    def submit(
        self,
        prompt: Prompt,
        arms: Sequence[Arm] = _DEFAULT_ARMS,
        sampling: SamplingParams | None = None,
        *,
        record_base_logprob: bool = True,
    ) -> RequestHandle:
        """Queues a request. Everything that can be refused is refused here, at once.

        Args:
            prompt: A text, read as is; or messages (``{"role": ..., "content": ...}``), laid
                out by the tokenizer's chat template. Special tokens typed in a message's
                content stay ordinary text, in a raw text they are special tokens.
            arms: Ways of running the prompt. A routed arm without knobs takes the model's.
            sampling: How tokens are picked; greedy, at most 128 by default. An answer also
                ends where the context window does.
            record_base_logprob: Also record what the base model thinks of a routed arm's tokens.
                Free of an extra pass, but the language model's head runs once more per token.

        Raises:
            PromptError: If the prompt is empty, malformed, or too long for the context window.
            ConfigError: If there is no arm, an expert is unknown, or knobs do not fit.
            QueueFullError: If ``max_queue`` requests are waiting already.
            EngineError: If the engine is closed.
        """
        self._check_open()
        sampling = sampling or SamplingParams()
        arms = self._checked_arms(arms)
        with self._tokenizer_lock:
            encoded = encode_prompt(
                self._tokenizer,
                prompt,
                context_length=self._context_length,
                vocab_size=self._vocab_size,
            )
        request = Request(
            header=self._header(encoded.text, sampling),
            prompt=encoded,
            arms=arms,
            sampling=sampling,
            with_base_logprob=record_base_logprob,
        )
        with self._changed:
            self._check_open()
            if len(self._queue) >= self._max_queue:
                raise QueueFullError(
                    f"the queue is full: {self._max_queue} requests are waiting already",
                    hint="try again when one of them has finished, or start the engine with a "
                    "larger max_queue",
                )
            self._queue.append(request)
            request.announce_position(len(self._queue))
            self._changed.notify_all()
        return RequestHandle(
            request,
            position=self._position,
            cancel=self._cancel,
            check_knobs=self._model.check_knobs,
        )

    def stream(
        self,
        prompt: Prompt,
        arms: Sequence[Arm] = _DEFAULT_ARMS,
        sampling: SamplingParams | None = None,
        *,
        record_base_logprob: bool = True,
    ) -> EventStream:
        """Queues a request and returns its events as they happen; arguments as ``submit``.

        Closing or dropping the stream cancels the request; a failure is raised from it.
        """
        return EventStream(
            self.submit(prompt, arms, sampling, record_base_logprob=record_base_logprob)
        )

    def run(
        self,
        prompt: Prompt,
        arms: Sequence[Arm] = _DEFAULT_ARMS,
        sampling: SamplingParams | None = None,
        *,
        record_base_logprob: bool = True,
    ) -> Run:
        """Runs a request to its end and returns the record; arguments as ``submit``.

        Raises:
            XLoraError: As ``submit``, or what the request failed with.
        """
        handle = self.submit(prompt, arms, sampling, record_base_logprob=record_base_logprob)
        try:
            return handle.wait()
        except BaseException:
            handle.cancel()  # an interrupted caller (Ctrl-C) leaves nothing behind
            raise

    # ---------------------------------------------------------------- life

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self._tokenizer

    @property
    def n_queued(self) -> int:
        """Number of requests that wait."""
        with self._changed:
            return len(self._queue)

    @property
    def closed(self) -> bool:
        """Whether the engine takes no more requests."""
        with self._changed:
            return self._closed

    def close(self) -> None:
        """Ends the thread. Waiting requests fail, the running one after its current token."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---------------------------------------------------------------- inside

    def _check_open(self) -> None:
        if self.closed:
            raise EngineError("the engine is closed", hint="make a new Engine")

    def _checked_arms(self, arms: Sequence[Arm]) -> tuple[Arm, ...]:
        names = self._model.adapter_names
        if not arms:
            raise ConfigError("a request needs at least one arm", hint="for example Arm.routed()")
        checked = []
        for arm in arms:
            if arm.kind == "expert" and arm.adapter not in names:
                raise ConfigError(
                    f"there is no expert {arm.adapter!r} in this model",
                    hint=f"its experts are {', '.join(names)}",
                )
            if arm.kind == "routed":
                knobs = self._model.check_knobs(arm.knobs or self._model.default_knobs)
                checked.append(replace(arm, knobs=knobs))
            else:
                checked.append(arm)
        return tuple(checked)

    def _header(self, prompt_text: str, sampling: SamplingParams) -> RunHeader:
        config = self._model.config_xlora
        return RunHeader(
            run_id=uuid.uuid4().hex,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            adapter_names=list(self._model.adapter_names),
            layer_names=list(self._model.lora_layer_names),
            present=self._model.present.tolist(),
            enable_softmax=config.enable_softmax,
            enable_softmax_topk=config.enable_softmax_topk,
            layerwise=config.layerwise_scalings or config.router == "per_layer",
            scaling_pass_value=config.scaling_pass_value,
            router=config.router,
            model_id=self._model_id,
            base_hash=self._base_hash,
            adapter_hashes=self._adapter_hashes,
            sampling=sampling,
            prompt_text=prompt_text,
            versions=identity.versions(),
        )

    def _position(self, request: Request) -> int:
        with self._changed:
            return self._queue.index(request) + 1 if request in self._queue else 0

    def _cancel(self, request: Request) -> None:
        with self._changed:
            if request in self._queue:
                self._queue.remove(request)
                request.finish_as_cancelled()
                self._announce_positions()
            else:
                request.ask_to_cancel()

    def _announce_positions(self) -> None:
        # A copy: the collector may drop a stream right here, which cancels its request.
        for position, request in enumerate(list(self._queue), start=1):
            request.announce_position(position)

    def _runner(self, *, batched: bool) -> Runner:
        reader = opening.open_rows(self._model) if batched else None
        if reader is None:
            return TurnRunner(self._model)
        return RowRunner(self._model, reader, self._overlap)

    def _work(self) -> None:
        """The engine thread: nobody but it runs the model."""
        try:
            with torch.inference_mode():
                while self._admit():
                    self._scheduler.round()
        finally:
            # Whatever ends the thread, nobody is left to wait for ever.
            with self._changed:
                self._closed = True
                self._scheduler.fail_all(closed_error("while this request ran"))
                for request in self._queue:
                    request.fail(closed_error("before this request was served"))
                self._queue.clear()
            self._model.edit_guard.release()

    def _admit(self) -> bool:
        """Waits for work and starts what there is room for; False when the engine closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._scheduler.n_active or self._closed)
            new: list[Request] = []
            while (
                self._queue
                and not self._closed
                and self._scheduler.n_active + len(new) < self._max_active
            ):
                new.append(self._queue.popleft())
            if new:
                self._announce_positions()
        for request in new:
            self._scheduler.admit(request)
        return not self.closed


def _check_serves(model: XLoraModel) -> None:
    """Raises ModelError for a base model that the engine's decode step cannot run."""
    name = type(model.base_model).__name__
    if model.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder, the engine serves decoder-only models",
            hint="call model.generate",
        )
    if not model.can_generate():
        raise ModelError(
            f"{name} writes no text, the engine serves models that generate",
            hint="call the model itself",
        )


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end an answer, from the first place that names any.

    The order is Hugging Face's: generation config, model config; then the tokenizer.
    """
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
