"""Arms one after another, each by the model's own passes: for models that cannot share a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xlora_core.engine.active import ActiveRequest
from xlora_core.engine.admission import Admission, MemoryBudget, Need
from xlora_core.engine.arms import ArmDecoder
from xlora_core.engine.requests import Request
from xlora_core.engine.runner import Runner, record_bytes
from xlora_core.engine.tracks import ArmTrack

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel


class TurnRunner(Runner):
    """Runs every arm with KV caches of its own, a token each in turn.

    Args:
        model: The model.
    """

    def __init__(self, model: XLoraModel) -> None:
        self._model = model
        self._decoders: dict[ActiveRequest, list[ArmDecoder]] = {}

    def books(self, budget: MemoryBudget) -> Admission:
        """Returns the books of caches that each arm has for itself."""
        return Admission(budget, _cache_bytes_per_token(self._model), one_block=False)

    def need(self, request: Request, n_tokens: int) -> Need:
        """Returns the caches of a request's arms; one that a classifier routes has two."""
        n_routed = 1 if self._model.is_routed_per_layer else 2
        return Need(
            n_rows=sum(n_routed if arm.kind == "routed" else 1 for arm in request.arms),
            n_tokens=n_tokens,
            record_bytes=record_bytes(request, n_tokens),
        )

    def admit(self, active: ActiveRequest) -> None:
        """Gives every arm its caches; they grow with the text."""
        with_base = active.request.with_base_logprob
        self._decoders[active] = [
            ArmDecoder(self._model, track.arm, with_base_logits=with_base)
            for track in active.tracks
        ]

    def prefill(self, active: ActiveRequest, n: int | None) -> None:
        """Reads the next n tokens of the prompt, arm by arm."""
        start = active.n_read
        chunk = active.prompt[start : None if n is None else start + n]
        is_last = start + len(chunk) == len(active.prompt)
        for track, decoder in zip(active.tracks, self._decoders[active], strict=True):
            track.read_prompt(chunk)
            _read(track, decoder, start, chunk, writes=is_last)
        active.n_read += len(chunk)

    def decode(self, actives: Sequence[ActiveRequest]) -> list[tuple[ActiveRequest, Exception]]:
        """Reads and writes a token for every arm of every request, one after another."""
        failed: list[tuple[ActiveRequest, Exception]] = []
        for active in actives:
            try:
                for track, decoder in zip(active.tracks, self._decoders[active], strict=True):
                    _step(track, decoder)
            except Exception as error:  # concerns this request; the others go on
                failed.append((active, error))
        return failed

    def release(self, active: ActiveRequest) -> None:
        """Frees the caches of a request's arms."""
        self._decoders.pop(active, None)

    def free_cache(self) -> None:
        """Does nothing: no cache outlives its request."""


def _cache_bytes_per_token(model: XLoraModel) -> int:
    """Returns the bytes of a token's keys and values; 0 for a model whose config tells no sizes."""
    config = model.config.get_text_config()
    n_query_heads = getattr(config, "num_attention_heads", None)
    n_heads = getattr(config, "num_key_value_heads", None) or n_query_heads
    n_blocks = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    if not n_query_heads or not n_heads or not n_blocks or not width:
        return 0
    size = getattr(config, "head_dim", None) or width // n_query_heads
    return int(n_blocks * 2 * n_heads * size * model.dtype.itemsize)


def _step(track: ArmTrack, decoder: ArmDecoder) -> None:
    if track.writes and track.unread is not None:
        _read(track, decoder, track.n_tokens - 1, [track.unread], writes=True)
    if track.ending is not None and not track.finished:
        _close(track, decoder)


def _read(
    track: ArmTrack, decoder: ArmDecoder, row: int, token_ids: Sequence[int], *, writes: bool
) -> None:
    """Reads tokens from ``row`` on and, if asked, writes the next one."""
    knobs = track.knobs
    reading = decoder.read(token_ids, knobs)
    if reading.router_logits is not None:
        track.record_routing(row, reading.router_logits, knobs)
    if writes:
        track.write_token(reading.logits, reading.base_logits, knobs)


def _close(track: ArmTrack, decoder: ArmDecoder) -> None:
    """Closes an arm. One last scaling pass gives the last token its row, too."""
    if track.unread is not None:
        knobs = track.knobs
        router_logits = decoder.read_router(track.unread, knobs)
        if router_logits is not None:
            track.record_routing(track.n_tokens - 1, router_logits, knobs)
    track.close()
