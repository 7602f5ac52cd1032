"""``python -m ift.cli`` is ``ift``."""

import sys

from ift.cli import main

sys.exit(main())
