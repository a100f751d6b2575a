"""Taking turns: whatever else the machine does falls on all sides of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from xlora_core.errors import ConfigError
from xlora_core.threads import apart


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a side did in one turn, or in several together.

    Attributes:
        seconds: Wall time of the tokens that were timed, > 0.
        n_tokens: How many they were, >= 1.
        n_context: Tokens that were read before the first of them; the largest of several turns.
        n_guessed: How often the scaling pass of a token was run ahead on a guess.
        n_hit: How often the guess was right.
    """

    seconds: float
    n_tokens: int
    n_context: int = 0
    n_guessed: int = 0
    n_hit: int = 0

    @property
    def ms(self) -> float:
        """Milliseconds a token."""
        return 1000 * self.seconds / self.n_tokens

    @property
    def hit_rate(self) -> float | None:
        """Share of the guesses that were right, from 0 to 1; None where nothing was guessed."""
        return self.n_hit / self.n_guessed if self.n_guessed else None


Side = Callable[[], Sample]


def take_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, Sample]:
    """Runs every side once a round, and returns each side's quietest turn.

    Another side begins every round. Other work on the machine only ever adds time, so the least
    is the nearest to what the side takes by itself. A turn is many tokens and its figure their
    mean: tokens whose scalings were guessed and others differ in cost, and all of them count.

    Every turn is done apart: threads that help one side would slow the next one down.

    Args:
        sides: Name -> what does one turn.
        rounds: How many, >= 1.

    Raises:
        ConfigError: If ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be a whole number >= 1, got {rounds}")
    names = list(sides)
    best: dict[str, Sample] = {}
    for n in range(rounds):
        first = n % len(names)
        for name in names[first:] + names[:first]:
            sample = apart(sides[name])
            if name not in best or sample.ms < best[name].ms:
                best[name] = sample
    return {name: best[name] for name in names}


def together(samples: Iterable[Sample]) -> Sample:
    """Returns the sum of several samples, such as one per text."""
    parts = list(samples)
    return Sample(
        seconds=sum(part.seconds for part in parts),
        n_tokens=sum(part.n_tokens for part in parts),
        n_context=max(part.n_context for part in parts),
        n_guessed=sum(part.n_guessed for part in parts),
        n_hit=sum(part.n_hit for part in parts),
    )
