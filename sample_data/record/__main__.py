"""``python -m sample_data.record``."""

import sys

from sample_data.record.command import main

sys.exit(main())
