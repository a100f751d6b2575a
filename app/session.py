"""What one browser session holds. The only module that names session-state keys."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import streamlit as st

from app.components.heatmap.planes import Planes
from xlora_core import AdapterOverride, Arm, Run, SamplingParams
from xlora_core.errors import XLoraError

if TYPE_CHECKING:
    from app.engine_client import Prompt
    from xlora_core.engine import RequestHandle

# Keys of widgets.
PROMPT = "prompt.text"
PRESET = "prompt.preset"
AS_CHAT = "prompt.as_chat"
ARMS = "arms.compared"
MAX_NEW_TOKENS = "sampling.max_new_tokens"
TEMPERATURE = "sampling.temperature"
SEED = "sampling.seed"
KNOB_TEMPERATURE = "knobs.temperature"
KNOB_WEIGHT = "knobs.weight"
RUN_FILE = "runs.file"
SHOWN = "runs.shown"
BUCKET_BY = "download.by"
BUCKET_WIDTH = "download.width"
HEATMAP = "heatmap"

_SHOWS = "shows"
_SHOW = "show"
_ERROR = "error"
_REROUTED = "rerouted"
_FRAME = "frame"
_N_FILES = "n_files"
_REACH = "reach"
_BY_MODULE = "overrides_by_module"
_VISITOR = "visitor"

MAX_SHOWS = 8


def knob_top_k(n_adapters: int) -> str:
    """Returns the top-k slider's key; a slider of another length is another widget."""
    return f"knobs.top_k.{n_adapters}"


def steer_choice(name: str) -> str:
    """Returns the key of an adapter's choice between the router and an override."""
    return f"steer.choice.{name}"


def steer_value(choice: str, name: str) -> str:
    """Returns the key of the slider that goes with an adapter's choice."""
    return f"steer.{choice}.{name}"


@dataclass(frozen=True)
class Request:
    """What was asked of the engine, so that it can be asked again."""

    prompt: Prompt
    arms: tuple[Arm, ...]
    sampling: SamplingParams


@dataclass(eq=False)
class Show:
    """A run on the screen: live, finished, or opened from a file.

    Attributes:
        title: What the list of runs calls it.
        source: Where it comes from.
        request: What was asked; None for a file.
        handle: The engine's handle, while the run lives.
        run: The finished run; None before.
        planes: What has been computed of its picture.
    """

    title: str
    source: Literal["engine", "file"]
    request: Request | None = None
    handle: RequestHandle | None = None
    run: Run | None = None
    planes: Planes = field(default_factory=Planes)

    @property
    def live(self) -> bool:
        """Whether the run still waits or grows."""
        return self.handle is not None


@dataclass(frozen=True)
class Message:
    """A failure to show: what is wrong and what to do."""

    text: str
    hint: str = ""


def get(key: str, default: Any = None) -> Any:
    """Returns a widget's value."""
    return st.session_state.get(key, default)


def put(key: str, value: Any) -> None:
    """Sets a widget's value; only from a callback or before the widget is drawn."""
    st.session_state[key] = value


def keep(key: str) -> None:
    """Keeps the value of a widget that this run of the script does not draw."""
    if key in st.session_state:
        st.session_state[key] = st.session_state[key]


def reach(key: str, low: float, high: float, start: float) -> tuple[float, float]:
    """Returns a slider's ends: as given, or as far as any value it has had in this session.

    A model or a run file may bring a value beyond them. They never move back, because a slider
    with other ends is another slider, which has forgotten its value.
    """
    widened: dict[str, tuple[float, float]] = st.session_state.setdefault(_REACH, {})
    low, high = widened.get(key, (low, high))
    value = float(st.session_state.get(key, start))
    widened[key] = min(low, value), max(high, value)
    return widened[key]


def overrides_by_module() -> dict[str, tuple[AdapterOverride, ...]]:
    """Returns adapter -> its overrides that differ between modules, which no widget can hold."""
    kept: dict[str, tuple[AdapterOverride, ...]] = st.session_state.setdefault(_BY_MODULE, {})
    return kept


def visitor() -> str:
    """Returns what tells this session's requests from those of others."""
    name: str = st.session_state.setdefault(_VISITOR, uuid.uuid4().hex)
    return name


def shows() -> list[Show]:
    """Returns the session's runs, newest first."""
    entries: list[Show] = st.session_state.setdefault(_SHOWS, [])
    return entries


def current() -> Show | None:
    """Returns the run on the screen."""
    return st.session_state.get(_SHOW)


def _let_go(leash: dict[str, RequestHandle]) -> None:
    for handle in leash.values():
        handle.cancel()


@st.cache_resource(scope="session", on_release=_let_go, show_spinner=False)
def _leash() -> dict[str, RequestHandle]:
    """Returns what ends with the session: a closed tab must not keep the engine busy."""
    return {}


def show(entry: Show) -> None:
    """Puts a run on the screen and in the list of runs."""
    if entry.handle:
        _leash()["handle"] = entry.handle
    entries = shows()
    if entry not in entries:
        entries.insert(0, entry)
        del entries[MAX_SHOWS:]
    st.session_state[_SHOW] = entry
    set_rerouted(False)
    clear_error()


def error() -> Message | None:
    """Returns the failure that has not been answered yet."""
    return st.session_state.get(_ERROR)


def set_error(failure: XLoraError) -> None:
    """Shows a failure until the next action; everything else stays."""
    st.session_state[_ERROR] = Message(failure.message, failure.hint)


def clear_error() -> None:
    """Forgets the failure."""
    st.session_state.pop(_ERROR, None)


def rerouted() -> bool:
    """Whether the finished run is drawn under the sliders' knobs instead of the recorded ones."""
    return bool(st.session_state.get(_REROUTED, False))


def set_rerouted(value: bool) -> None:
    """Chooses between the sliders' knobs and the recorded ones."""
    st.session_state[_REROUTED] = value


def cached_frame(signature: tuple[Any, ...]) -> bytes | None:
    """Returns the last frame if nothing that it shows has changed."""
    kept = st.session_state.get(_FRAME)
    return kept[1] if kept and kept[0] == signature else None


def keep_frame(signature: tuple[Any, ...], frame: bytes) -> None:
    """Remembers the last frame."""
    st.session_state[_FRAME] = (signature, frame)


def next_file_key() -> str:
    """Returns the uploader's key; a new one empties it."""
    return f"{RUN_FILE}.{st.session_state.get(_N_FILES, 0)}"


def forget_file() -> None:
    """Empties the uploader at the next run of the script."""
    st.session_state[_N_FILES] = st.session_state.get(_N_FILES, 0) + 1
