"""The engine: one thread at a time owns the model, many callers share it by a bounded queue."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from xlora_core.config import Arm, EngineLimits, SamplingParams
from xlora_core.engine.admission import MemoryBudget
from xlora_core.engine.faults import closed_error, told_anew
from xlora_core.engine.free_memory import has_room_for_copy
from xlora_core.engine.handle import EventStream, RequestHandle
from xlora_core.engine.identity import ModelIdentity
from xlora_core.engine.options import check_options
from xlora_core.engine.overlap import Overlap, OverlapMode
from xlora_core.engine.prompts import Prompt, encode_prompt
from xlora_core.engine.queue import FairQueue
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.runner import Runner
from xlora_core.engine.scheduler import Scheduler
from xlora_core.engine.serving import (
    check_serves,
    checked_arms,
    positions_follow_length,
    stop_token_ids,
)
from xlora_core.engine.step_threads import StepThreads
from xlora_core.engine.turns import TurnRunner
from xlora_core.engine.watchdog import Watchdog
from xlora_core.errors import EngineError
from xlora_core.rows import RowReader, opening
from xlora_core.threads import apart

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel
    from xlora_core.recording import Run

_DEFAULT_ARMS = (Arm.routed(),)


class Engine:
    """Answers prompts with an X-LoRA model, many requests at a time, clients in turn.

    A daemon thread owns the model, and starts one for the requests at hand where that is on a CPU;
    every method here may be called by any thread. All arms of all
    running requests share one run over the weights per token, where the base model allows it
    (``open_rows`` says why not); otherwise they take turns. A request that fails does so alone.
    Use it as a context manager, or call ``close``.

    Args:
        model: The model; put in evaluation mode. Nobody else should change it meanwhile; its
            adapters cannot be edited until the engine is closed.
        tokenizer: The Hugging Face tokenizer of its base model.
        max_queue: Most requests that wait, beside those that run; >= 1. A named client has at
            most half of the places.
        max_active: Most requests that run at the same time; >= 1.
        limits: What a single request may ask for; nothing is limited by default.
        memory_bytes: What caches and records of all running requests may take together; a
            request waits until there is room for it. A share of what is free now if None.
        step_timeout: Seconds without a sign of life after which the engine is taken for stuck and
            everybody who waits is told so; None never does.
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
        limits: EngineLimits | None = None,
        memory_bytes: int | None = None,
        step_timeout: float | None = 300.0,
        overlap: OverlapMode = "auto",
        n_guesses: int = 1,
        batched: bool = True,
        model_id: str = "",
    ) -> None:
        check_options(
            max_queue=max_queue,
            max_active=max_active,
            n_guesses=n_guesses,
            memory_bytes=memory_bytes,
            step_timeout=step_timeout,
            overlap=overlap,
        )
        check_serves(model)
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._max_active = max_active
        self._limits = limits or EngineLimits()
        self._context_length = model.context_length
        self._vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._stop_ids = stop_token_ids(model, tokenizer)
        self._identity = ModelIdentity(model, model_id)
        self._threads = StepThreads.of(model)
        self._scheduler = Scheduler(
            self._runner(overlap, n_guesses, batched=batched),
            tokenizer,
            stop_ids=self._stop_ids,
            context_length=self._context_length,
            budget=MemoryBudget.of_free_memory(model.device)
            if memory_bytes is None
            else MemoryBudget(memory_bytes),
            max_seconds=self._limits.max_seconds,
            whole_prompts=positions_follow_length(model),
        )
        self._changed = threading.Condition()
        self._queue: FairQueue[Request] = FairQueue(max_queue)
        self._no_room = False  # the next in the queue waits for memory, not for a place
        self._closed = False
        self._failure: EngineError | None = None
        self._ended = threading.Event()  # the thread, or the hope that it ever will
        self._watchdog = Watchdog(step_timeout, self._give_up)
        # Tokenizers are read-only in use, but their settings are checked per call.
        self._tokenizer_lock = threading.Lock()
        model.edit_guard.hold()
        self._thread = threading.Thread(target=self._live, name="xlora-engine", daemon=True)
        self._serving = self._thread  # or the one that it has started for the requests at hand
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
        client: str | None = None,
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
            client: Whose request it is. Clients that wait take turns, so that many requests of
                one do not keep others out; a request without one is a client of its own.

        Raises:
            PromptError: If the prompt is empty, malformed, or too long for the context window or
                the engine's limits.
            ConfigError: If there is no arm, an expert is unknown, knobs do not fit, or the request
                is beyond the engine's limits or memory.
            QueueFullError: If ``max_queue`` requests are waiting already, or half of them of this
                client.
            EngineError: If the engine is closed or has failed.
        """
        self._check_open()
        sampling = sampling or self._default_sampling()
        arms = checked_arms(self._model, arms)
        with self._tokenizer_lock:
            encoded = encode_prompt(
                self._tokenizer,
                prompt,
                context_length=self._context_length,
                vocab_size=self._vocab_size,
            )
        self._limits.check(
            n_prompt_tokens=len(encoded.token_ids),
            max_new_tokens=sampling.max_new_tokens,
            n_arms=len(arms),
        )
        request = Request(
            header=self._identity.header(encoded.text, sampling),
            prompt=encoded,
            arms=arms,
            sampling=sampling,
            with_base_logprob=record_base_logprob,
        )
        self._scheduler.check(request)
        with self._changed:
            self._check_open()
            self._queue.push(request, client)
            # Another client's requests may have moved back.
            self._announce_positions()
            self._changed.notify_all()
        return RequestHandle(
            request,
            position=self._position,
            expected_seconds=self._expected_seconds,
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
        client: str | None = None,
    ) -> EventStream:
        """Queues a request and returns its events as they happen; arguments as ``submit``.

        Closing or dropping the stream cancels the request; a failure is raised from it.
        """
        return EventStream(
            self.submit(
                prompt, arms, sampling, record_base_logprob=record_base_logprob, client=client
            )
        )

    def run(
        self,
        prompt: Prompt,
        arms: Sequence[Arm] = _DEFAULT_ARMS,
        sampling: SamplingParams | None = None,
        *,
        record_base_logprob: bool = True,
        client: str | None = None,
    ) -> Run:
        """Runs a request to its end and returns the record; arguments as ``submit``.

        Raises:
            XLoraError: As ``submit``, or what the request failed with.
        """
        handle = self.submit(
            prompt, arms, sampling, record_base_logprob=record_base_logprob, client=client
        )
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
        """Ends the thread. Waiting requests fail, the running ones after their current token."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() not in (self._thread, self._serving):
            self._ended.wait()
            if self._failure is None:  # one that is stuck is not waited for
                self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---------------------------------------------------------------- inside

    def _check_open(self) -> None:
        with self._changed:
            if self._failure is not None:
                raise told_anew(self._failure)
            if self._closed:
                raise EngineError("the engine is closed", hint="make a new Engine")

    def _default_sampling(self) -> SamplingParams:
        """Returns the usual sampling, within the engine's limits."""
        usual, most = SamplingParams(), self._limits.max_new_tokens
        if most is None:
            return usual
        return replace(usual, max_new_tokens=min(usual.max_new_tokens, most))

    def _position(self, request: Request) -> int:
        with self._changed:
            return self._queue.position(request)

    def _expected_seconds(self, request: Request) -> float | None:
        with self._changed:
            waiting = list(self._queue)
            if request not in waiting:
                return 0.0
            return self._waits(waiting)[waiting.index(request)]

    def _waits(self, waiting: Sequence[Request]) -> list[float | None]:
        """Returns when each of the first requests in the queue will start."""
        n_free = 0 if self._no_room else max(self._max_active - self._scheduler.n_active, 0)
        return self._scheduler.expected_seconds(waiting, n_free=n_free)

    def _cancel(self, request: Request) -> None:
        with self._changed:
            if self._queue.remove(request):
                request.finish_as_cancelled()
                self._announce_positions()
                self._changed.notify_all()  # whoever comes next may fit
            else:
                request.ask_to_cancel()

    def _announce_positions(self) -> None:
        waiting = list(self._queue)
        told = zip(waiting, self._waits(waiting), strict=True)
        for position, (request, seconds) in enumerate(told, start=1):
            request.announce_position(position, seconds)

    def _runner(self, mode: OverlapMode, n_guesses: int, *, batched: bool) -> Runner:
        reader = apart(self._open_rows) if batched else None
        if reader is None:
            return TurnRunner(self._model)
        keeps_cache = self._model.device.type == "cuda"
        overlap = Overlap.of(self._model, reader, mode, n_guesses)
        return RowRunner(self._model, reader, overlap, keeps_cache=keeps_cache)

    def _open_rows(self) -> RowReader | None:
        with self._threads.running():  # whether a reader is right is tried with steps
            return opening.open_rows(self._model, packed=has_room_for_copy(self._model))

    def _live(self) -> None:
        """The engine's thread: nobody but it, and what it starts and waits for, runs the model."""
        try:
            self._watchdog.run(self._work)
        finally:
            # Whatever ends the thread, nobody is left to wait for ever.
            try:
                with self._changed, torch.inference_mode():  # as the rows that are erased now
                    self._closed = True
                    self._scheduler.close(closed_error("while this request ran"))
                    for request in self._queue.clear():
                        request.fail(closed_error("before this request was served"))
            finally:
                self._model.edit_guard.release()
                self._ended.set()

    def _work(self) -> None:
        while self._waits_for_work():
            # On a CPU an idle engine keeps no threads that would slow others down.
            apart(self._serve) if self._model.device.type == "cpu" else self._serve()

    def _waits_for_work(self) -> bool:
        """Returns True as soon as there is work, False when the engine closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_work() or self._closed)
            return not self._closed

    def _has_work(self) -> bool:
        return len(self._queue) > 0 or self._scheduler.n_active > 0

    def _serve(self) -> None:
        """Works until there is nothing left to do."""
        self._serving = threading.current_thread()
        with torch.inference_mode():
            while self._admit():
                with self._watchdog.step(), self._threads.running():
                    self._scheduler.round()

    def _admit(self) -> bool:
        """Starts what there is room for; False when there is nothing to do, or no time for it."""
        with self._changed:
            for waiting in list(self._queue):
                if waiting.cancelled:  # whoever asked for it is gone
                    self._cancel(waiting)
        while (request := self._next_request()) is not None:
            with self._watchdog.step():
                self._scheduler.admit(request)
        with self._changed:
            return self._has_work() and not self._closed

    def _next_request(self) -> Request | None:
        with self._changed:
            if self._closed or self._scheduler.n_active >= self._max_active:
                return None
            request = self._queue.take(self._scheduler.fits)
            self._no_room = request is None and len(self._queue) > 0
            if request is not None:
                self._announce_positions()
            return request

    def _give_up(self, failure: EngineError) -> None:
        """Tells everybody that the engine's thread is stuck or dead; called by the watchdog."""
        with self._changed:
            self._failure, self._closed = failure, True
            for request in [*self._scheduler.requests, *self._queue.clear()]:
                request.fail(told_anew(failure))
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # a dying one still tidies up
            self._ended.set()
