"""When it pays to read a guess of the next token along with the token itself.

The scaling pass of a token can share the weights' one read with the main pass of the token before
it, if it is known which token that will be. The base model's own next token is a guess that costs
nothing. A wrong guess is read for nothing, and the scaling pass runs again.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

OverlapMode = Literal["auto", "on", "off"]
OVERLAP_MODES = ("auto", "on", "off")

# What base and mixture were found to agree on; measurements soon take its place.
_FIRST_HIT_RATE = 0.8
_HIT_WEIGHT = 1 / 64
# Steps of one size that are remembered; the quietest counts, since other work only adds time. Fewer
# than three say nothing: the first ones are slow.
_N_REMEMBERED = 8
_FEWEST = 3
# Steps without guesses after which one guesses again, to see whether it still does not pay.
_PAUSE = 64


class Overlap:
    """Decides, from what steps took and guesses were worth, whether to guess.

    Without guesses a token takes two runs over the weights. With them it takes one that is c times
    as dear for its further rows, and after a wrong guess, in ``1 - a`` of all cases, one more for
    the scaling pass alone. So guessing pays for a hit rate ``a > c - 1``.

    Args:
        mode: ``"on"`` and ``"off"`` decide it once and for all.
        n_siblings: Guesses for the same place, >= 1.
    """

    def __init__(self, mode: OverlapMode = "auto", n_siblings: int = 1) -> None:
        self.mode = mode
        self.n_siblings = n_siblings
        self._hit_rate = _FIRST_HIT_RATE
        self._seconds: dict[int, deque[float]] = {}
        self._n_without = 0

    def guesses(self, n_arms: int) -> int:
        """Returns how many guesses each of n routed arms had better read; 0 for none."""
        if self.mode == "off":
            return 0
        if self.mode == "auto" and not self._pays(n_arms):
            self._n_without += 1
            if self._n_without % _PAUSE:
                return 0
        return self.n_siblings

    def guessed(self, *, hit: bool) -> None:
        """Notes whether a guess was right, or would have been."""
        self._hit_rate += _HIT_WEIGHT * (hit - self._hit_rate)

    def took(self, n_tokens: int, seconds: float) -> None:
        """Notes what a decode step over n tokens took."""
        self._seconds.setdefault(n_tokens, deque(maxlen=_N_REMEMBERED)).append(seconds)

    def _pays(self, n_arms: int) -> bool:
        alone, together = self._cost(n_arms), self._cost((1 + self.n_siblings) * n_arms)
        if alone is None or together is None:
            return True
        return self._hit_rate > together / alone - 1

    def _cost(self, n_tokens: int) -> float | None:
        """Returns the seconds of a step of nearly so many tokens; None if too few are known."""
        known = {n: of for n, of in self._seconds.items() if len(of) >= _FEWEST}
        if not known:
            return None
        nearest = min(known, key=lambda n: abs(n - n_tokens))
        return min(known[nearest]) if abs(nearest - n_tokens) * 4 <= n_tokens else None
