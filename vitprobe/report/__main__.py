"""``python -m vitprobe.report``."""

import sys

from vitprobe.report.command import main

if __name__ == "__main__":
    sys.exit(main())
