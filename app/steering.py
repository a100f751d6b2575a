"""What the page does with single adapters: left to the router, muted, rescaled or pinned.

Each adapter has a choice of its own, so its overrides and the state of its widgets are translated
adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from app import session
from xlora_core import AdapterOverride

AUTO, MUTE, SCALE, PIN = "Auto", "Mute", "Scale", "Pin"
CHOICES = (AUTO, MUTE, SCALE, PIN)
# Only for an adapter whose overrides differ between modules, as a file or the model brings them.
BY_MODULE = "By module"
START = {SCALE: 1.0, PIN: 0.5}

Overrides = tuple[AdapterOverride, ...]


def of_adapter(overrides: Iterable[AdapterOverride], name: str) -> Overrides:
    """Returns the overrides of one adapter, without those that a later one hides."""
    own: Overrides = ()
    for override in overrides:
        if override.adapter == name:
            own = (override,) if override.modules is None else (*own, override)
    return own


def choice_of(own: Overrides) -> tuple[str, float | None]:
    """Returns the choice that stands for an adapter's overrides, and its value if it has one."""
    if not own:
        return AUTO, None
    if len(own) > 1 or own[0].modules is not None:
        return BY_MODULE, None
    return {"mute": MUTE, "scale": SCALE, "pin": PIN}[own[0].kind], own[0].value


def from_widgets(names: Sequence[str], fallback: Iterable[AdapterOverride]) -> Overrides:
    """Returns the overrides that the widgets show.

    Args:
        names: The adapters.
        fallback: The overrides that widgets start from.
    """
    known = tuple(fallback)
    return tuple(o for name in names for o in _shown(name, of_adapter(known, name)))


def _shown(name: str, fallback: Overrides) -> Overrides:
    start, _ = choice_of(fallback)
    choice = session.get(session.steer_choice(name), start)
    if choice == BY_MODULE:
        return by_module(name, fallback)
    if choice == MUTE:
        return (AdapterOverride.mute(name),)
    if choice == AUTO:
        return ()
    make = AdapterOverride.scale if choice == SCALE else AdapterOverride.pin
    first = first_value(choice, fallback)
    return (make(name, float(session.get(session.steer_value(choice, name), first))),)


def first_value(choice: str, fallback: Overrides) -> float:
    """Returns the value that the slider of a choice starts from."""
    start, value = choice_of(fallback)
    return START[choice] if value is None or start != choice else float(value)


def by_module(name: str, fallback: Overrides) -> Overrides:
    """Returns those overrides of an adapter that differ between modules; () if there are none.

    Those of the run on the screen, else those that widgets start from.
    """
    start, _ = choice_of(fallback)
    return session.overrides_by_module().get(name) or (fallback if start == BY_MODULE else ())


def to_widgets(overrides: Iterable[AdapterOverride], names: Sequence[str]) -> None:
    """Moves the widgets; only from a callback."""
    known = tuple(overrides)
    for name in names:
        own = of_adapter(known, name)
        choice, value = choice_of(own)
        session.put(session.steer_choice(name), choice)
        session.overrides_by_module()[name] = own if choice == BY_MODULE else ()
        if value is not None:
            session.put(session.steer_value(choice, name), value)


def release(names: Sequence[str]) -> None:
    """Gives all adapters back to the router; only from a callback."""
    for name in names:
        session.put(session.steer_choice(name), AUTO)
