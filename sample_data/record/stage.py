"""Runs recordings, and turns their knobs at the very tokens that the list names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sample_data.record.errors import RecordingError
from sample_data.record.recordings import Change, Recording
from xlora_core.engine.identity import ModelIdentity
from xlora_core.engine.overlap import Overlap
from xlora_core.engine.prompts import encode_prompt
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
from xlora_core.engine.turns import TurnRunner
from xlora_core.recording import Run
from xlora_core.rows import opening

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel


class Stage:
    """The engine without its thread: rounds take place when they are called for.

    An ``Engine`` goes on while its caller makes up his mind, so knobs set in mid-run take effect
    a token earlier or later. Here they are set between two rounds. Runs are recorded one after
    the other, since sharing steps changes the last bits of what is computed, and always with one
    guess of the next token, since whether guessing pays depends on what else the machine does.

    Args:
        model: The model; put in evaluation mode.
        tokenizer: The tokenizer of its base model.
        model_id: Its name in the runs.

    Raises:
        ModelError: If the base model writes no text.
    """

    def __init__(self, model: XLoraModel, tokenizer: Any, *, model_id: str) -> None:
        check_serves(model)
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._identity = ModelIdentity(model, model_id)
        self._scheduler = Scheduler(
            self._runner(),
            tokenizer,
            stop_ids=stop_token_ids(model, tokenizer),
            context_length=model.context_length,
            whole_prompts=positions_follow_length(model),
        )

    def record(self, recording: Recording) -> Run:
        """Returns the run of a recording, under the recording's id.

        The same model on the same machine gives the same run, but for the time of day and the
        seconds that tokens took.

        Raises:
            RecordingError: If the answer ended before all knobs were turned.
            XLoraError: If the prompt, an arm or a knob does not fit the model.
        """
        request = self._request(recording)
        due = list(recording.changes)
        n_prompt = len(request.prompt.token_ids)
        with torch.inference_mode():
            self._scheduler.admit(request)
            while not request.ended:
                self._scheduler.round()
                due = _turned(request, n_prompt, due)
        if request.error is not None:
            raise request.error
        if due:
            raise RecordingError(
                f"{recording.id}: the answer ended before token {due[0].at}, where a knob was to "
                "be turned",
                hint="choose an earlier token in recordings.json",
            )
        run = request.run()
        return replace(run, header=replace(run.header, run_id=recording.id))

    def _runner(self) -> Runner:
        with torch.inference_mode():
            reader = opening.open_rows(self._model)
        if reader is None:
            return TurnRunner(self._model)
        return RowRunner(self._model, reader, Overlap.of(self._model, reader, "on"))

    def _request(self, recording: Recording) -> Request:
        prompt = encode_prompt(
            self._tokenizer,
            recording.messages,
            context_length=self._model.context_length,
            vocab_size=int(self._model.get_input_embeddings().weight.shape[0]),
        )
        for change in recording.changes:
            self._model.check_knobs(change.knobs)
        request = Request(
            header=self._identity.header(prompt.text, recording.sampling),
            prompt=prompt,
            arms=checked_arms(self._model, recording.arms),
            sampling=recording.sampling,
            with_base_logprob=True,
        )
        self._scheduler.check(request)
        return request


def _turned(request: Request, n_prompt: int, due: Sequence[Change]) -> list[Change]:
    """Sets the knobs of those tokens that are read next; returns the changes still to come."""
    left = []
    for change in due:
        unread = request.run().tracks[change.arm].n_tokens - 1
        if unread < n_prompt + change.at or not request.set_knobs(change.arm, change.knobs):
            left.append(change)
    return left
