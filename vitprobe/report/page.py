"""The report as one HTML page that needs nothing beside itself but its links to the numbers."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from vitprobe.report.panels import find_panels
from vitprobe.results.drawing import DPI, provenance_line
from vitprobe.results.result import FAILS, HOLDS, OPEN, Result, Text

# Verdicts are told by a sign and words, not by colour alone.
SIGNS = {HOLDS: ("✓", "holds"), FAILS: ("✗", "fails"), OPEN: ("?", "open")}
# A picture larger than this is brought down to 256 colours, which a heat map hardly shows.
MAX_PNG = 700_000
# On a phone figures scroll sideways rather than shrink below this share of their size.
LEAST_SCALE = 0.55


@dataclass(frozen=True)
class Section:
    """One measurement on the page.

    Attributes:
        result: what was measured.
        figure: its figure, rendered once.
        png: the same as bytes.
        file: name of the NPZ beside the page.
        without: why models are not in it, a sentence each.
    """

    result: Result
    figure: Any
    png: bytes
    file: str
    without: tuple[str, ...] = ()

    @property
    def text(self) -> Text:
        return self.result.text


def page(sections: Sequence[Section], missing: Sequence[tuple[str, str]], models: Any,
         command: str) -> str:  # fmt: skip
    """The page.

    Args:
        sections: in the order of the page.
        missing: (measurement, why) of those that none of the models can have, or that failed.
        models: provenance of all models.
        command: the command line.
    """
    import jinja2

    shown = [_shown(section, i) for i, section in enumerate(sections)]
    rows = [row for section, one in zip(sections, shown) for row in _rows(section, one)]
    names = [model["name"] for model in models]
    data = {
        one["anchor"]: {
            "panels": one["panels"],
            "value": section.text.value,
            "places": section.text.places,
            "logarithms": section.text.logarithms,
        }
        for section, one in zip(sections, shown)
        if one["panels"]
    }
    source = (files("vitprobe.report") / "page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return template.from_string(source).render(
        title=f"Inside {_listed(names)}",
        summary=f"{len(sections)} figures by vitprobe: what the papers measured, on these models.",
        sections=shown,
        rows=rows,
        tally=_tally(rows),
        missing=[{"what": what, "why": why} for what, why in missing],
        models=models,
        runs=[_run(section, one) for section, one in zip(sections, shown)],
        versions=_versions(sections),
        command=command,
        # No tag can be closed from within: "<" is written as JSON may write it.
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    )


def _shown(section: Section, number: int) -> dict[str, Any]:
    """What the template needs of a section."""
    result, text = section.result, section.text
    width, height = (round(inches * DPI) for inches in section.figure.get_size_inches())
    title = text.title
    if result.analysis == "head_subsets":
        title += f": {' × '.join(result.models)}"
    return {
        "anchor": f"{result.analysis}-{number}",
        "title": title,
        "short": result.analysis.replace("_", " "),
        "text": text,
        "without": section.without,
        # Half a pixel a dot: figures are drawn for sharp screens.
        "width": round(width / 1.5),
        "height": round(height / 1.5),
        "min_width": round(width / 1.5 * LEAST_SCALE),
        "alt": f"{title}, for {_listed(result.models)}. {text.shows}",
        "png": base64.b64encode(_bounded(section.png)).decode(),
        "panels": find_panels(section.figure) if text.value else [],
        "caption": provenance_line(result.meta),
        "href": quote(section.file),
        "file": section.file,
    }


def _rows(section: Section, shown: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for finding in section.result.findings():
        sign, kind = SIGNS[finding.verdict]
        rows.append(
            {
                "sign": sign,
                "kind": kind,
                "verdict": finding.verdict,
                "claim": finding.claim,
                "numbers": finding.numbers,
                "source": finding.source,
                "anchor": shown["anchor"],
                "short": shown["short"],
            }
        )
    return rows


def _tally(rows: Sequence[dict[str, str]]) -> str:
    count = Counter(row["kind"] for row in rows)
    return (
        f"Of {len(rows)} claims, {count['holds']} hold, {count['fails']} do not, and "
        f"{count['open']} are inconclusive."
    )


def _run(section: Section, shown: dict[str, Any]) -> dict[str, Any]:
    meta = section.result.meta
    images = meta.get("images")
    settings = [f"seed {meta['seed']}"]
    if images:
        settings += [f"batches of {meta['batch_size']}", meta["precision"], meta["device"]]
        if images["broken"]:
            settings.append(f"{len(images['broken'])} unreadable images left out")
    return {
        "anchor": shown["anchor"],
        "short": shown["short"],
        "models": ", ".join(section.result.models),
        "images": images["source"] if images else "none: weights alone",
        "n": f"{meta['n']:,}" if images else "–",
        "settings": ", ".join(settings),
        "sha256": images["sha256"] if images else "–",
    }


def _versions(sections: Sequence[Section]) -> str:
    found = [section.result.meta["versions"] for section in sections]
    told = dict.fromkeys(", ".join(f"{k} {v}" for k, v in one.items()) for one in found)
    return "Measured with " + "; or ".join(told) + "." if told else ""


def _bounded(png: bytes) -> bytes:
    """The same picture, in fewer colours where it is large."""
    if len(png) <= MAX_PNG:
        return png
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return min(png, buffer.getvalue(), key=len)


def _listed(names: Sequence[str]) -> str:
    """``A, B and C``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
