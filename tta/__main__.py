"""``python -m tta``."""

import sys

from tta.cli import main

if __name__ == "__main__":
    sys.exit(main())
