"""Sets of overrides for the runs of ``tests.recorded_runs``, for hypothesis to draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.recorded_runs import ADAPTERS, LAYERS
from xlora_core import AdapterOverride

_VALUES = st.sampled_from([0.0, 1.0]) | st.floats(-3, 3, width=32)
_MODULES = st.none() | st.lists(
    st.sampled_from(["*", "*.q_proj", "*.[!q]_proj", "model.layers.0.?_proj", *LAYERS]),
    min_size=1,
    max_size=2,
)
_OVERRIDES = st.one_of(
    st.builds(AdapterOverride.pin, st.sampled_from(ADAPTERS), _VALUES, _MODULES),
    st.builds(AdapterOverride.scale, st.sampled_from(ADAPTERS), _VALUES, _MODULES),
    st.builds(AdapterOverride.mute, st.sampled_from(ADAPTERS), _MODULES),
)
# Most runs have few sets and often the same.
OVERRIDES = st.just(()) | st.lists(_OVERRIDES, max_size=4).map(tuple)
