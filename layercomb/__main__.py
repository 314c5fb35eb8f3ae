"""``python -m layercomb``: the launcher."""

import sys

from layercomb.cli import main

sys.exit(main())
