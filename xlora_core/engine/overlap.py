"""When it pays to read a guess of the next token along with the token itself.

The scaling pass of a token can share the weights' one read with the main pass of the token before
it, if it is known which token that will be. The base model's own next token is a guess that costs
nothing. A better one costs a row: the arm reads the guess, too, with the scalings of the token
before, since its own are not known yet. They change little from token to token, so such a draft
nearly always tells what the arm will write. A wrong guess is read for nothing, and the scaling
pass runs again.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xlora_core.engine.serving import positions_follow_length

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel
    from xlora_core.rows import RowReader

OverlapMode = Literal["auto", "on", "off"]
OVERLAP_MODES = ("auto", "on", "off")

# What was found of guesses by the base model, and of drafts; worth as much as so many guesses.
_FIRST_HIT_RATES = {False: 0.75, True: 0.95}
_FIRST_WEIGHT = 8
# Later ones count more: how often guesses are right depends on the text.
_LEAST_HIT_WEIGHT = 1 / 64
# Steps of one size that are remembered; the quietest counts, since other work only adds time. Fewer
# than three say nothing: the first ones are slow.
_N_REMEMBERED = 8
_FEWEST = 3
# Steps after which a way that does not pay is tried once, to see whether it still does not.
_PAUSE = 64


@dataclass(frozen=True, kw_only=True)
class Guessing:
    """What a routed arm reads ahead in a step.

    Attributes:
        n: Guesses of the next token that its scaling row reads; 0 for none.
        drafts: Whether its own row reads the best of them, too.
    """

    n: int
    drafts: bool = False

    def n_tokens(self, n_arms: int, n_others: int) -> int:
        """Returns the tokens of a step of n routed arms, and of others that read one each."""
        return n_arms * (1 + self.n + self.drafts) + n_others


NO_GUESSES = Guessing(n=0)


class Overlap:
    """Decides, from what steps took and guesses were worth, whether and how to guess.

    Without guesses a token takes two runs over the weights. With them it takes one, dearer for its
    further rows, and after a wrong guess one more for the scaling pass alone.

    Args:
        mode: ``"on"`` and ``"off"`` decide it once and for all.
        n_siblings: Guesses for the same place, >= 1.
        drafts: Whether guesses may be drafts.
    """

    def __init__(
        self, mode: OverlapMode = "auto", n_siblings: int = 1, *, drafts: bool = True
    ) -> None:
        self.mode = mode
        self.n_siblings = n_siblings
        self._guessing = [Guessing(n=n_siblings)]
        if drafts:
            self._guessing.append(Guessing(n=n_siblings, drafts=True))
        self._hit_rates = dict(_FIRST_HIT_RATES)
        self._n_guessed = dict.fromkeys(_FIRST_HIT_RATES, _FIRST_WEIGHT)
        self._seconds: dict[int, deque[float]] = {}
        self._n_steps = 0

    @classmethod
    def of(
        cls, model: XLoraModel, reader: RowReader, mode: OverlapMode, n_siblings: int = 1
    ) -> Overlap:
        """Returns the choice for a model: without drafts where these cost too much, or are wrong.

        A step that is recorded for single tokens is not recorded for a token and its draft. Where
        positions follow the length of a text, the token would be read as one of the longer text
        that the draft makes.

        Args:
            model: The model.
            reader: What reads its rows.
            mode: As for the class.
            n_siblings: As for the class.
        """
        drafts = not (reader.records_single_tokens or positions_follow_length(model))
        return cls(mode, n_siblings, drafts=drafts)

    def choose(self, n_arms: int, n_others: int = 0) -> Guessing:
        """Returns what each of n routed arms had better read ahead.

        Args:
            n_arms: Routed arms that write.
            n_others: Other arms that write, and read a token in every step.
        """
        if self.mode == "off":
            return NO_GUESSES
        if self.mode == "on":
            return self._guessing[-1]
        for way in self._guessing:
            if self._cost(way.n_tokens(n_arms, n_others)) is None:
                return way
        ways = [*self._guessing, NO_GUESSES]
        best = min(ways, key=lambda way: self._expected(way, n_arms, n_others))
        others = [way for way in self._guessing if way != best]
        self._n_steps += 1
        if others and self._n_steps % _PAUSE == 0:
            return others[self._n_steps // _PAUSE % len(others)]
        return best

    def guessed(self, *, hit: bool, drafted: bool = False) -> None:
        """Notes whether a guess was right, or would have been, and whether a draft told it."""
        self._n_guessed[drafted] += 1
        weight = max(1 / self._n_guessed[drafted], _LEAST_HIT_WEIGHT)
        self._hit_rates[drafted] += weight * (hit - self._hit_rates[drafted])

    def took(self, n_tokens: int, seconds: float) -> None:
        """Notes what a decode step over n tokens took."""
        self._seconds.setdefault(n_tokens, deque(maxlen=_N_REMEMBERED)).append(seconds)

    def _expected(self, way: Guessing, n_arms: int, n_others: int) -> float:
        """Returns the seconds that a token takes."""
        alone = self._cost_at_most(n_arms * (1 + way.drafts) + n_others)
        if not way.n:
            return 2 * alone
        together = self._cost_at_most(way.n_tokens(n_arms, n_others))
        return together + (1 - self._hit_rates[way.drafts]) * alone

    def _cost_at_most(self, n_tokens: int) -> float:
        """Returns the seconds of such a step, or of the smallest larger one that is known."""
        cost = self._cost(n_tokens)
        if cost is None:
            larger = [n for n, of in self._seconds.items() if n > n_tokens and len(of) >= _FEWEST]
            cost = min(self._seconds[min(larger)]) if larger else math.inf
        return cost

    def _cost(self, n_tokens: int) -> float | None:
        """Returns the seconds of a step of nearly so many tokens; None if too few are known."""
        known = {n: of for n, of in self._seconds.items() if len(of) >= _FEWEST}
        if not known:
            return None
        nearest = min(known, key=lambda n: abs(n - n_tokens))
        return min(known[nearest]) if abs(nearest - n_tokens) * 4 <= n_tokens else None
