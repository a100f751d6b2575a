"""``python -m sample_data.build``."""

import sys

from sample_data.build.command import main

sys.exit(main())
