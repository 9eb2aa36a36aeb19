"""The README's quick start, ``vitprobe cka`` without options: its figure, and what it prints.

Writes figures/quick_start.png and .npz, and the text between the README's marks.
"""

import io
from pathlib import Path

from vitprobe import cka, load_result
from vitprobe.results.printing import print_findings
from vitprobe.results.result import Result

HOME = Path(__file__).parents[1]
BEGIN, END = "<!-- quick_start -->\n```text\n", "```\n<!-- end of quick_start -->"
STEM = "vitprobe-out/cka-vit_small_box-resnet_box"


def printed(result: Result) -> str:
    """What the command prints, without colours and without how long it took."""
    text = io.StringIO()
    print_findings(result.findings(), text, width=100)
    return f"{STEM}.png\n{STEM}.npz\n{text.getvalue()}"


def main() -> int:
    status = cka.main(["--out", str(HOME / "figures"), "--stem", "quick_start"])
    result = load_result(HOME / "figures" / "quick_start.npz")
    page = (HOME / "README.md").read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    page = f"{before}{BEGIN}{printed(result)}{END}{rest.split(END)[1]}"
    (HOME / "README.md").write_text(page, encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
