"""What the buttons and sliders do. Plain functions over the session, run as callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from app import presets, session, steering
from app.engine_client import EngineClient
from xlora_core import Arm, RoutingKnobs, Run, SamplingParams
from xlora_core.errors import EngineError, XLoraError

if TYPE_CHECKING:
    from xlora_core.engine import RequestHandle

MERGED = "merged 1/K"
BASE = "base model"

FINAL_STATES = ("done", "cancelled", "failed")


def arm_options(adapter_names: tuple[str, ...]) -> dict[str, Arm]:
    """Returns what a run can be compared with, by the name on the screen."""
    experts = {f"{name} alone": Arm.expert(name) for name in adapter_names}
    return {MERGED: Arm.merged(), BASE: Arm.base(), **experts}


def knobs_from_widgets(adapter_names: Sequence[str], fallback: RoutingKnobs) -> RoutingKnobs:
    """Returns the knobs that the widgets show."""
    n_adapters = len(adapter_names)
    top_k = session.get(session.knob_top_k(n_adapters), fallback.top_k or n_adapters)
    return RoutingKnobs(
        # The slider's right end says "all"; a model that needs a top-k keeps the number.
        top_k=None if top_k == n_adapters and fallback.top_k is None else int(top_k),
        temperature=float(session.get(session.KNOB_TEMPERATURE, fallback.temperature)),
        global_weight=float(session.get(session.KNOB_WEIGHT, fallback.global_weight)),
        overrides=steering.from_widgets(adapter_names, fallback.overrides),
    )


def knobs_to_widgets(knobs: RoutingKnobs, adapter_names: Sequence[str]) -> None:
    """Moves the widgets."""
    n_adapters = len(adapter_names)
    session.put(session.knob_top_k(n_adapters), knobs.top_k or n_adapters)
    session.put(session.KNOB_TEMPERATURE, knobs.temperature)
    session.put(session.KNOB_WEIGHT, knobs.global_weight)
    steering.to_widgets(knobs.overrides, adapter_names)


def sampling_from_widgets() -> SamplingParams:
    """Returns how the next request picks its tokens."""
    return SamplingParams(
        max_new_tokens=int(session.get(session.MAX_NEW_TOKENS)),
        temperature=float(session.get(session.TEMPERATURE)),
        seed=int(session.get(session.SEED)),
    )


def choose_preset() -> None:
    """Copies the chosen preset into the prompt box."""
    preset = presets.by_title(session.get(session.PRESET))
    if preset:
        session.put(session.PROMPT, preset.prompt)


def generate(client: EngineClient) -> None:
    """Starts a run of the prompt in the box."""
    text = str(session.get(session.PROMPT, ""))
    chat = bool(session.get(session.AS_CHAT, True)) and bool(text.strip())
    names = client.card.adapter_names
    options = arm_options(names)
    try:
        knobs = knobs_from_widgets(names, client.card.knobs)
        compared = [options[name] for name in session.get(session.ARMS, []) if name in options]
        request = session.Request(
            prompt=[{"role": "user", "content": text}] if chat else text,
            arms=(Arm.routed(knobs), *compared),
            sampling=sampling_from_widgets(),
        )
        _submit(client, request, _title(text))
    except XLoraError as failure:
        session.set_error(failure)


def regenerate(client: EngineClient) -> None:
    """Runs the shown run's prompt again, under the knobs that the sliders show."""
    shown = session.current()
    if shown is None or shown.run is None:
        return
    names = client.card.adapter_names
    try:
        routed = Arm.routed(knobs_from_widgets(names, client.card.knobs))
        if shown.request is None:
            header = shown.run.header
            arms = tuple(track.arm for track in shown.run.tracks)
            asked = session.Request(header.prompt_text, arms, header.sampling)
        else:
            asked = shown.request
        arms = tuple(routed if arm.kind == "routed" else arm for arm in asked.arms)
        request = session.Request(asked.prompt, arms, asked.sampling)
        _submit(client, request, shown.title)
    except XLoraError as failure:
        session.set_error(failure)


def _submit(client: EngineClient, request: session.Request, title: str) -> None:
    session.clear_error()
    shown = session.current()
    if shown and shown.handle:
        raise EngineError("A run is still going.", hint="Stop it first, then start the next one.")
    handle = client.submit(request.prompt, request.arms, request.sampling, client=session.visitor())
    session.show(session.Show(title, "engine", request=request, handle=handle))


def _title(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 48 else words[:47] + "…"


def stop() -> None:
    """Cancels the live run; what it has written stays."""
    shown = session.current()
    if shown and shown.handle:
        shown.handle.cancel()


def settle(shown: session.Show) -> bool:
    """Turns a run whose request has ended into a finished one.

    Returns:
        Whether it has ended. A run that failed or never started leaves its error to show.
    """
    handle = shown.handle
    if handle is None or handle.state not in FINAL_STATES:
        return handle is None
    failure = handle.error
    shown.run = started_run(handle)
    shown.handle = None
    if failure is not None:
        session.set_error(failure)
    return True


def started_run(handle: RequestHandle) -> Run | None:
    """Returns the run as far as it is, or None before its prompt was read."""
    try:
        run = handle.run
    except EngineError:  # it has not started, or was cancelled before it did
        return None
    return run if len(run.tracks[0].token_ids) else None


def turn_knobs(adapter_names: Sequence[str], fallback: RoutingKnobs) -> None:
    """Applies the widgets: from the next token of a live run, or to a finished run's recording."""
    shown = session.current()
    if shown is None:
        return
    if shown.handle is None:
        session.set_rerouted(shown.run is not None)
        return
    arms = shown.request.arms if shown.request else ()
    try:
        for index, arm in enumerate(arms):
            if arm.kind == "routed":
                shown.handle.set_knobs(index, knobs_from_widgets(adapter_names, fallback))
    except XLoraError as failure:
        session.set_error(failure)


def back_to_recorded() -> None:
    """Draws the finished run as it was recorded."""
    session.set_rerouted(False)
    shown = session.current()
    if shown and shown.run:
        _follow(shown.run)


def _follow(run: Run) -> None:
    """Moves the widgets to the last knobs of a run."""
    knobs = last_knobs(run)
    if knobs:
        knobs_to_widgets(knobs, run.header.adapter_names)


def last_knobs(run: Run) -> RoutingKnobs | None:
    """Returns the knobs in force at the end of the run's routed arm."""
    for track in run.tracks:
        if track.arm.kind == "routed" and len(track.top_k):
            knobs = track.knobs(-1)
            return replace(
                knobs,
                temperature=round(knobs.temperature, 6),
                global_weight=round(knobs.global_weight, 6),
            )
    return None


def open_run(key: str) -> None:
    """Shows the run of the uploaded file. A file that cannot be read changes nothing else."""
    upload = session.get(key)
    if upload is None:
        return
    try:
        run = Run.from_bytes(upload.getvalue(), upload.name)
    except XLoraError as failure:
        session.set_error(failure)
    else:
        session.show(session.Show(f"{upload.name} (file)", "file", run=run))
        _follow(run)
    session.forget_file()


def choose_shown(titles: list[str]) -> None:
    """Puts another run of this session on the screen."""
    index = titles.index(session.get(session.SHOWN))
    chosen = session.shows()[index]
    session.show(chosen)
    if chosen.run:
        _follow(chosen.run)
