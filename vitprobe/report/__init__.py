"""One self-contained page of every figure that applies to some models, with the verdicts.

``command`` plans, measures and writes; ``page`` fills ``page.html``; ``panels`` makes figures
readable on hover; ``texts`` holds the words. What a figure shows belongs to its measurement.
"""

from vitprobe.report.command import main

__all__ = ["main"]
