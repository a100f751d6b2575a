"""Overrides: one adapter pinned, muted or rescaled, in all modules or in some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from xlora_core.config.checks import is_finite, raise_if
from xlora_core.errors import ConfigError

KINDS = ("pin", "scale", "mute")
PATTERN_HINT = (
    "a pattern stands for whole module paths, with * for anything: '*.q_proj', 'model.layers.3.*'"
)
# Far above any real one; the time to compile a pattern grows with it.
LONGEST_PATTERN = 1000
_GLOB_CHARACTERS = frozenset("*?[")
# Modules that an error names, of perhaps hundreds.
_N_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class AdapterOverride:
    """What one adapter does instead of what the router says.

    The effective scaling of an adapter in a module at a token is ``g * s``, with the global
    weight g and the scaling s as top-k left it. An override acts between the two:
    ``g * value`` where the adapter is pinned, ``g * value * s`` where it is rescaled, 0 where it
    is muted. So a pinned adapter acts even where top-k dropped it, g = 0 is still the base
    model, and the other adapters keep their scalings: nothing is normalised anew.

    Where the adapter has no weights in a module, there is nothing to override.

    Make one with ``AdapterOverride.pin``, ``scale`` or ``mute``.

    Attributes:
        adapter: The adapter's name.
        kind: ``"pin"``, ``"scale"`` or ``"mute"``.
        value: The scaling of a pinned adapter, the factor of a rescaled one; None for a muted
            one.
        modules: Paths of adapted modules, or patterns of them with ``*`` (anything), ``?`` (one
            character) and ``[...]`` (one of these); one text or several. None: all modules.

    Raises:
        ConfigError: Listing every field that is malformed or contradicts another.

    Example:
        >>> AdapterOverride.pin("math", 0.5, "*.q_proj").label
        'math pinned at 0.5 in *.q_proj'
    """

    adapter: str
    kind: str
    value: float | None = None
    modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        faults: list[str] = []
        if not isinstance(self.adapter, str) or not self.adapter.strip():
            faults.append(f"adapter must be a name, got {self.adapter!r}")
        if self.kind not in KINDS:
            faults.append(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        elif self.kind == "mute" and self.value is not None:
            faults.append(f"a muted adapter has no value, got {self.value!r}")
        elif self.kind != "mute" and not is_finite(self.value):
            faults.append(f"value must be a finite number, got {self.value!r}")
        modules = (self.modules,) if isinstance(self.modules, str) else self.modules
        if modules is not None:
            if not isinstance(modules, Sequence) or not all(
                isinstance(pattern, str) and pattern for pattern in modules
            ):
                faults.append(f"modules must be paths or patterns, got {self.modules!r}")
            elif not modules:
                faults.append("modules must name at least one module; None stands for all")
            elif any(len(p) > LONGEST_PATTERN and _is_glob(p) for p in modules):
                faults.append(f"a pattern has at most {LONGEST_PATTERN} characters")
            else:
                object.__setattr__(self, "modules", tuple(modules))
        raise_if([f"override of {self.adapter!r}: {fault}" for fault in faults])

    @classmethod
    def pin(
        cls, adapter: str, value: float, modules: str | Sequence[str] | None = None
    ) -> AdapterOverride:
        """Holds an adapter's scaling at a value, whatever the router says."""
        return cls(adapter=adapter, kind="pin", value=value, modules=modules)

    @classmethod
    def scale(
        cls, adapter: str, factor: float, modules: str | Sequence[str] | None = None
    ) -> AdapterOverride:
        """Multiplies an adapter's scaling by a factor."""
        return cls(adapter=adapter, kind="scale", value=factor, modules=modules)

    @classmethod
    def mute(cls, adapter: str, modules: str | Sequence[str] | None = None) -> AdapterOverride:
        """Switches an adapter off."""
        return cls(adapter=adapter, kind="mute", modules=modules)

    @property
    def patterns(self) -> tuple[str, ...] | None:
        """The modules as a tuple; None for all."""
        return None if self.modules is None else tuple(self.modules)

    @property
    def label(self) -> str:
        """The override in words, such as ``"math muted in *.q_proj"``."""
        what = {"pin": "pinned at", "scale": "rescaled by", "mute": "muted"}[self.kind]
        value = "" if self.value is None else f" {self.value:g}"
        where = "" if self.patterns is None else f" in {', '.join(self.patterns)}"
        return f"{self.adapter} {what}{value}{where}"

    def module_indices(self, layer_names: Sequence[str]) -> list[int]:
        """Returns the numbers of the modules that the override acts in, in order.

        Args:
            layer_names: L paths of the adapted modules.
        """
        if self.patterns is None:
            return list(range(len(layer_names)))
        return sorted({n for p in self.patterns for n in _matching(p, tuple(layer_names))})

    def faults(self, adapter_names: Sequence[str], layer_names: Sequence[str]) -> list[str]:
        """Returns what does not fit a model of these adapters and modules, one sentence each."""
        faults = []
        if self.adapter not in adapter_names:
            faults.append(
                f"override of {self.adapter!r}: there is no such adapter, "
                f"only {', '.join(map(repr, adapter_names))}"
            )
        for pattern in self.patterns or ():
            if not _matching(pattern, tuple(layer_names)):
                more = ", ..." if len(layer_names) > _N_NAMED else ""
                faults.append(
                    f"override of {self.adapter!r}: no adapted module matches {pattern!r}; there "
                    f"are {len(layer_names)}: {', '.join(layer_names[:_N_NAMED])}{more}"
                )
        return faults

    @classmethod
    def from_dict(cls, values: object) -> AdapterOverride:
        """Returns the override of a mapping such as ``dataclasses.asdict`` makes.

        Raises:
            ConfigError: For anything else, unknown or missing keys, or values out of range.
        """
        keys = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(keys):
            raise ConfigError(f"an override must have the keys {', '.join(keys)}, got {values!r}")
        return cls(**values)


Overrides = tuple[AdapterOverride, ...]


def checked_overrides(overrides: object) -> tuple[Overrides, list[str]]:
    """Returns the overrides as a tuple, and the faults found on the way."""
    if isinstance(overrides, Iterable):
        found = tuple(overrides)
        if all(isinstance(override, AdapterOverride) for override in found):
            return found, []
    return (), [f"overrides must be a list of AdapterOverride, got {overrides!r}"]


@lru_cache(maxsize=1024)
def override_faults(
    overrides: Overrides, adapter_names: tuple[str, ...], layer_names: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns what does not fit a model of these adapters and modules, one sentence each."""
    faults = (o.faults(adapter_names, layer_names) for o in overrides)
    return tuple(dict.fromkeys(fault for found in faults for fault in found))


def with_override(overrides: Overrides, new: AdapterOverride) -> Overrides:
    """Returns the overrides with a new one that wins over them, without those it leaves no say.

    Example:
        >>> muted = (AdapterOverride.mute("math", "*.q_proj"), AdapterOverride.mute("code"))
        >>> [o.label for o in with_override(muted, AdapterOverride.pin("math", 1.0))]
        ['code muted', 'math pinned at 1']
    """
    kept = (
        o for o in overrides if o.adapter != new.adapter or new.modules not in (None, o.modules)
    )
    return (*kept, new)


def renamed_overrides(overrides: Overrides, names: Mapping[str, str]) -> Overrides:
    """Returns the overrides of the adapters that stay.

    Args:
        overrides: The overrides.
        names: Old name -> name from now on, of each adapter that stays.
    """
    return tuple(replace(o, adapter=names[o.adapter]) for o in overrides if o.adapter in names)


def matching_cost(overrides: Iterable[AdapterOverride], layer_names: Sequence[str]) -> int:
    """Returns about how many characters are compared to find the overrides' modules."""
    per_character = sum(
        1 + sum(len(p) if _is_glob(p) else 1 for p in o.patterns or ()) for o in overrides
    )
    return per_character * sum(map(len, layer_names))


def _is_glob(pattern: str) -> bool:
    return not _GLOB_CHARACTERS.isdisjoint(pattern)


@lru_cache(maxsize=1024)
def _matching(pattern: str, layer_names: tuple[str, ...]) -> tuple[int, ...]:
    if pattern in layer_names:  # a path may have brackets in it
        return (layer_names.index(pattern),)
    if not _is_glob(pattern):
        return ()
    return tuple(n for n, name in enumerate(layer_names) if fnmatchcase(name, pattern))
