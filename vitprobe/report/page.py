"""The report as one HTML page that needs nothing beside itself but its links to the numbers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from vitprobe.report import grid
from vitprobe.report.panels import find_panels
from vitprobe.results.drawing import DPI
from vitprobe.results.result import Result, Text, as_untrained

# An image larger than this is brought down to 256 colours, which a heat map hardly shows.
MAX_PNG = 300_000
# Width of the small images that lead to the figures; twice what is shown, for sharp screens.
THUMB_WIDTH = 320
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
         command: str, title: str = "") -> str:  # fmt: skip
    """The page.

    Args:
        sections: in the order of the page.
        missing: (measurement, why) of those that none of the models can have, or that failed.
        models: provenance of all models.
        command: the command line.
        title: of the page; the models' names by default.
    """
    import jinja2

    shown = [_shown(section, i) for i, section in enumerate(sections)]
    names = [model["name"] for model in models]
    claims = [claim for one in shown for claim in one["claims"]]
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
        title=title or f"Inside {_listed(names)}",
        sections=shown,
        columns=[
            [as_untrained(model) for name in column for model in models if model["name"] == name]
            for column in grid.columns(claims, names)
        ],
        papers=grid.rows(claims, names),
        tally=grid.tally([claim.finding for claim in claims]),
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
    anchor = f"{result.analysis}-{number}"
    if result.analysis == "head_subsets":
        title += f": {' × '.join(result.models)}"
    return {
        "anchor": anchor,
        "claims": [grid.claim(one, result.models, anchor) for one in result.findings()],
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
        "thumb": base64.b64encode(_thumb(section.png)).decode(),
        "panels": find_panels(section.figure) if text.value else [],
        "caption": _caption(result.meta),
        "href": quote(section.file),
        "file": section.file,
    }


def _caption(meta: dict[str, Any]) -> str:
    """What a figure is of; the models have cards."""
    images = meta.get("images")
    return f"{meta['n']:,} images of {images['source']}." if images else "From the weights alone."


def _run(section: Section, shown: dict[str, Any]) -> dict[str, Any]:
    meta = section.result.meta
    images = meta.get("images")
    settings = [f"seed {meta['seed']}"]
    if images:
        settings += [f"batches of {meta['batch_size']}", meta["precision"], meta["device"]]
        if images["broken"]:
            settings.append(f"{len(images['broken'])} unreadable images left out")
        if images.get("skipped"):
            settings.append(f"{len(images['skipped'])} images left out for values not finite")
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
    """The same image, in fewer colours where it is large."""
    return png if len(png) <= MAX_PNG else min(png, _few_colours(_opened(png)), key=len)


def _thumb(png: bytes) -> bytes:
    """The image, small."""
    image = _opened(png)
    return _few_colours(
        image.resize((THUMB_WIDTH, round(THUMB_WIDTH * image.height / image.width)))
    )


def _opened(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def _few_colours(image: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _listed(names: Sequence[str]) -> str:
    """``A, B and C``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
