"""The project's pages: links lead somewhere, and the README shows what its commands print."""

import re
import sys
from pathlib import Path

import pytest

from vitprobe import __main__, load_result

HOME = Path(__file__).parents[1]
PAGES = ("README.md", "analyses/README.md", "tests/README.md", "vitprobe/data/README.md")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    page = HOME / name
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert targets
    for target in targets:
        # Actions are pages of the host, beside the repository's files; real/ is drawn elsewhere.
        if not target.startswith(("http", "../../actions/", "figures/real/")):
            assert (page.parent / target).exists(), target


def test_the_readme_shows_what_the_quick_start_prints(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(HOME / "analyses"), *sys.path])
    import quick_start

    text = (HOME / "README.md").read_text(encoding="utf-8")
    result = load_result(HOME / "figures" / "quick_start.npz")
    assert f"{quick_start.BEGIN}{quick_start.printed(result)}{quick_start.END}" in text
    assert result.models == ["vit_small_box", "resnet_box"] and result.meta["n"] == 512


def test_the_readme_names_every_command():
    table = (HOME / "README.md").read_text(encoding="utf-8")
    for name in __main__.commands():
        assert re.search(rf"^\|.*`{name}`.*\|", table, re.MULTILINE), name
