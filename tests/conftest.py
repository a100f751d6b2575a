"""Settings of all tests: hypothesis tries the same examples in every run.

So a run that fails, fails again. ``HYPOTHESIS_PROFILE=explore`` looks for new counterexamples.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
