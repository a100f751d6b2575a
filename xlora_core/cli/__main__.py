"""``python -m xlora_core.cli`` is ``xlora``."""

from __future__ import annotations

import sys

from xlora_core.cli.main import main

sys.exit(main())
