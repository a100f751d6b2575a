"""Whatever order requests come, change their knobs and go in, each gets what it gets alone."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_chat import EXPERTS, tiny_chat_xlora, tiny_tokenizer
from xlora_core import routing
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine.overlap import Overlap, OverlapMode
from xlora_core.engine.prompts import EncodedPrompt
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.sampling import Sampler
from xlora_core.engine.scheduler import Scheduler
from xlora_core.model import XLoraModel
from xlora_core.recording import RunHeader, Track
from xlora_core.rows import RowReader
from xlora_core.rows.opening import open_rows

TOKENIZER = tiny_tokenizer()
OTHER_ARMS = [Arm.merged(), Arm.base(), Arm.expert("verse")]
KNOBS = st.builds(
    RoutingKnobs,
    top_k=st.sampled_from([None, 1, 2]),
    temperature=st.sampled_from([0.3, 1.0]),
    global_weight=st.sampled_from([0.0, 1.0, 1.5]),
)


@dataclass(frozen=True)
class Submit:
    prompt: list[int]
    arms: list[Arm]
    sampling: SamplingParams


@dataclass(frozen=True)
class SetKnobs:
    which: int
    arm: int
    knobs: RoutingKnobs


@dataclass(frozen=True)
class Cancel:
    which: int


@dataclass(frozen=True)
class Rounds:
    n: int


PROMPTS = st.lists(st.integers(5, len(TOKENIZER) - 1), min_size=1, max_size=9)
SUBMITS = st.builds(
    Submit,
    prompt=PROMPTS,
    arms=st.lists(
        st.one_of(st.sampled_from(OTHER_ARMS), KNOBS.map(Arm.routed)), min_size=1, max_size=4
    ),
    sampling=st.builds(
        SamplingParams,
        max_new_tokens=st.integers(1, 7),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
    ),
)
ACTIONS = st.lists(
    st.one_of(
        SUBMITS,
        st.builds(SetKnobs, which=st.integers(0, 5), arm=st.integers(0, 3), knobs=KNOBS),
        st.builds(Cancel, which=st.integers(0, 5)),
        st.builds(Rounds, n=st.integers(1, 4)),
    ),
    min_size=1,
    max_size=12,
)


@functools.cache
def model() -> XLoraModel:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_chat_xlora(Path(folder)).double()


@functools.cache
def reader() -> RowReader:
    reader = open_rows(model())
    assert reader is not None
    return reader


def header(sampling: SamplingParams) -> RunHeader:
    return RunHeader(
        adapter_names=model().adapter_names,
        layer_names=model().lora_layer_names,
        present=model().present.tolist(),
        enable_softmax=True,
        enable_softmax_topk=False,
        layerwise=True,
        sampling=sampling,
    )


@dataclass
class Stage:
    """An engine without its thread: the test says when a round takes place."""

    overlap: OverlapMode
    n_guesses: int
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            RowRunner(model(), reader(), Overlap(self.overlap, self.n_guesses)),
            TOKENIZER,
            stop_ids=frozenset([TOKENIZER.eos_token_id]),
            context_length=128,
        )

    def play(self, action: Submit | SetKnobs | Cancel | Rounds) -> None:
        match action:
            case Submit(prompt, arms, sampling):
                arms = [
                    Arm.routed(a.knobs or RoutingKnobs()) if a.kind == "routed" else a for a in arms
                ]
                request = Request(
                    header=header(sampling),
                    prompt=EncodedPrompt(text="", token_ids=list(prompt)),
                    arms=tuple(arms),
                    sampling=sampling,
                    with_base_logprob=True,
                )
                self.requests.append(request)
                self.scheduler.admit(request)
            case SetKnobs(which, arm, knobs) if which < len(self.requests):
                request = self.requests[which]
                if arm < len(request.arms) and request.arms[arm].kind == "routed":
                    request.set_knobs(arm, knobs)
            case Cancel(which) if which < len(self.requests):
                self.requests[which].ask_to_cancel()
            case Rounds(n):
                for _ in range(n):
                    self.scheduler.round()
            case _:
                pass

    def finish(self) -> None:
        while self.scheduler.n_active:
            self.scheduler.round()


def scalings_in_force(track: Track, router_logits: torch.Tensor) -> torch.Tensor | None:
    """Returns ``[T, L, K]`` that the recorded knobs make of the model's own router logits."""
    if track.arm.kind == "base":
        return None
    n_tokens, _, n_adapters = router_logits.shape
    if track.arm.kind != "routed":
        names = list(EXPERTS)
        one_hot = [float(name == track.arm.adapter) for name in names]
        weights = [1 / n_adapters] * n_adapters if track.arm.kind == "merged" else one_hot
        return torch.tensor(weights, dtype=router_logits.dtype).expand_as(router_logits)
    scalings = routing.scalings_from_logits(
        router_logits,
        enable_softmax=True,
        temperature=torch.tensor(track.temperature[:n_tokens]),
    )
    return routing.effective_scalings(
        scalings,
        top_k=torch.tensor(track.top_k[:n_tokens]).long(),
        global_weight=torch.tensor(track.global_weight[:n_tokens]).double(),
    )


def check_against_the_uncached_model(track: Track, sampling: SamplingParams) -> None:
    """Recomputes a track in one uncached call, under the knobs that it says were in force."""
    ids = track.token_ids.tolist()
    if not ids:
        return
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        router_logits = model().scaling_pass(input_ids=input_ids).router_logits[0]
        base = model().main_pass(scalings=None, input_ids=input_ids).logits[0]
        # The last token of a record that was cut off need not be routed; nothing follows from it.
        n_read = track.n_routed if track.arm.kind == "routed" else len(ids)
        assert n_read >= len(ids) - 1
        if track.router_logits is not None:
            np.testing.assert_allclose(
                track.router_logits, router_logits[:n_read].numpy(), atol=1e-2, rtol=1e-3
            )
        scalings = scalings_in_force(track, router_logits[:n_read])
        held = None if scalings is None else scalings[None]
        logits = model().main_pass(scalings=held, input_ids=input_ids[:, :n_read]).logits[0]
    sampler = Sampler(sampling, ids[: track.n_prompt], n_alternatives=5)
    for place in range(track.n_prompt, len(ids)):
        choice = sampler.choose(logits[place - 1])
        assert choice.token_id == ids[place]
        assert abs(choice.logprob - track.logprob[place]) < 1e-4
        if track.arm.kind in ("routed", "base"):
            expected = torch.log_softmax(base[place - 1], dim=-1)[ids[place]].item()
            assert abs(expected - track.base_logprob[place]) < 1e-4


@settings(max_examples=30, deadline=None)
@given(
    actions=ACTIONS,
    overlap=st.sampled_from(["auto", "on", "off"]),
    n_guesses=st.sampled_from([1, 3]),
)
def test_every_request_gets_what_it_gets_alone(
    actions: list[Submit | SetKnobs | Cancel | Rounds], overlap: OverlapMode, n_guesses: int
) -> None:
    stage = Stage(overlap, n_guesses)
    with torch.inference_mode():
        for action in actions:
            stage.play(action)
        stage.finish()
    for request in stage.requests:
        tracks = request.run().tracks
        assert request.state in ("done", "cancelled")
        assert request.cancelled or request.state == "done"
        for track in tracks:
            assert request.state == "cancelled" or track.finish_reason in ("stop", "length")
            check_against_the_uncached_model(track, request.sampling)
            if track.finish_reason == "length":
                n_written = len(track.token_ids) - track.n_prompt
                assert n_written == request.sampling.max_new_tokens
    assert reader().cache.n_rows == 0
