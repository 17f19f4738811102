"""``python -m dla_fast``."""

from __future__ import annotations

import sys

from dla_fast.cli import main

sys.exit(main())
