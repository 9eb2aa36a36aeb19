"""The result base: arrays with their provenance, saved whole, loaded without executing anything.

A result file is an ``.npz`` of plain arrays plus ``meta``, a JSON string. It is enough to draw the
figure again without the models.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.special import ndtr, stdtrit

from vitprobe.catalogue import measurements
from vitprobe.errors import VitprobeError, shown
from vitprobe.results.reading import check, read_npz
from vitprobe.results.tables import Label, as_csv, as_dataframe, long_table
from vitprobe.results.writing import write_atomically

FORMATS = ("png", "pdf", "svg")
HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"
# A claim is decided two standard errors away from its threshold, about 95 % of the time rightly:
# as many as that takes by Student's t where the standard error itself comes of few replicates.
DECISIVE_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, and whether it holds for the models at hand.

    Attributes:
        claim: in one sentence.
        source: paper and figure.
        verdict: ``holds``, ``does not hold`` or ``inconclusive``.
        numbers: what decided it, with standard errors; parts are set apart by semicolons.
        brief: the claim in about five words, for tables.
        over: the layers that decided it: ``12 and 16 blocks``.
        models: names of those that it is about, as ``Result.models`` has them.
    """

    claim: str
    source: str
    verdict: str
    numbers: str
    brief: str = ""
    over: str = ""
    models: list[str] = field(default_factory=list, hash=False)

    def __str__(self) -> str:
        over = f"over {self.over}: " if self.over else ""
        return f"{self.verdict}: {self.claim} ({self.source}) [{over}{self.numbers}]"


def plain(value: float) -> float | None:
    """A number as JSON has it, which knows no NaN: None stands for undefined."""
    return float(value) if math.isfinite(value) else None


def decide(
    value: float | None,
    standard_error: float | None,
    threshold: float = 0.0,
    replicates: int | None = None,
) -> str:
    """Whether ``value`` > ``threshold``, as a verdict; open within two standard errors.

    Args:
        value: what is claimed to be above.
        standard_error: of it.
        threshold: what it is to be above.
        replicates: of which the standard error was estimated (groups of batches, images). Few of
            them underestimate it often: two batches take 14 standard errors, four 3.3.
    """
    if value is None or standard_error is None:
        return OPEN
    if not math.isfinite(value) or not math.isfinite(standard_error):
        return OPEN
    reach = DECISIVE_STANDARD_ERRORS
    if replicates is not None and replicates > 1:
        reach = float(stdtrit(replicates - 1, ndtr(reach)))
    if abs(value - threshold) <= reach * standard_error:
        return OPEN
    return HOLDS if value > threshold else FAILS


def combine(verdicts: Sequence[str]) -> str:
    """The verdict on a claim of several parts: all must hold, one that fails decides."""
    if FAILS in verdicts:
        return FAILS
    return OPEN if OPEN in verdicts or not verdicts else HOLDS


def plus_minus(value: float | None, standard_error: float | None, digits: int = 3) -> str:
    """``0.512 ± 0.004``; the error is left out where there is none."""
    if value is None or not math.isfinite(value):
        return "undefined"
    text = f"{value:.{digits}f}"
    if standard_error is None or not math.isfinite(standard_error):
        return text
    return f"{text} ± {standard_error:.{digits}f}"


def as_untrained(model: dict[str, Any]) -> str:
    """A model's name, with the word where its weights are random and the name does not say it.

    Networks are so named by default (``NAME (random)``), but not where users give names.
    """
    name = str(model["name"])
    untrained = str(model.get("weights", "")).startswith("random")
    said = re.search(r"[(@]random\b|\buntrained\b", name)
    return f"{name} (untrained)" if untrained and not said else name


def _naming_the_untrained(findings: Callable[[Any], list[Finding]]) -> Any:
    """Claims that say which networks are untrained: nothing follows from them for others."""

    @wraps(findings)
    def named(result: Any) -> list[Finding]:
        names = {model["name"]: as_untrained(model) for model in result.meta["models"]}
        found = findings(result)
        if all(name == told for name, told in names.items()):
            return found
        # The longest first, as one may begin with another.
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        pattern = re.compile(rf"(?<![\w.-])({either})(?![\w-])")
        return [
            replace(one, claim=pattern.sub(lambda match: names[match[0]], one.claim))
            for one in found
        ]

    return named


@dataclass(frozen=True)
class Text:
    """The words of one kind of figure.

    Attributes:
        title: of the section.
        shows: what is drawn, and the papers' figures.
        read: how to read it.
        value: what a heat map's cell holds; empty where there is no heat map to point at.
        places: whether rows and columns of the heat maps mean something by themselves.
        logarithms: whether the heat maps are drawn from logarithms (to base 10) of the value.
    """

    title: str
    shows: str
    read: str
    value: str = ""
    places: bool = True
    logarithms: bool = False


@dataclass(frozen=True)
class Result:
    """What a measurement returns: documented arrays (the subclass's fields) and ``meta``.

    Attributes:
        meta: provenance as plain JSON values: analysis, models with the origin and sha256 of their
            weights, images with a digest, n, batch size, seed, versions, command line.
    """

    meta: dict[str, Any]

    analysis: ClassVar[str] = ""
    text: ClassVar[Text] = Text("", "", "")
    # Array -> names of its axes, and axis -> names of its places: what tables are made from.
    axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    names: ClassVar[dict[str, tuple[str, ...]]] = {}

    @property
    def models(self) -> list[str]:
        """Names of the models, in order."""
        return [model["name"] for model in self.meta["models"]]

    def rows_of(self, model: int | str) -> np.ndarray:
        """Indices of the layers of a model, given by its number or its name.

        Raises:
            VitprobeError: no model of this name.
        """
        if isinstance(model, str):
            if model not in self.models:
                raise VitprobeError(
                    f"No model {model!r} in this result, which has {', '.join(self.models)}."
                )
            model = self.models.index(model)
        return np.flatnonzero(self.arrays()["model_of_layer"] == model)

    def plot(self, ax: Any = None) -> Any:
        """Draw on ``ax`` and return it, or on a new figure and return that; computes nothing."""
        raise NotImplementedError

    def figure(self) -> Any:
        """``plot()`` under its title, where ``meta`` holds one (``--title``)."""
        from vitprobe.results.drawing import titled

        return titled(self.plot(), self.meta.get("title", ""))

    def findings(self) -> list[Finding]:
        """The papers' claims that apply to these models, each with its verdict and numbers."""
        return []

    def labels(self) -> list[Label]:
        """What tables say of places beside the text arrays and ``model_of_...`` and the like."""
        return []

    def to_csv(self, path: str | Path, quantities: Sequence[str] = ()) -> Path:
        """Write the numbers as a long (tidy) table, one number per row; see ``results.tables``.

        Columns: ``quantity`` (the array's name); where the number stands (``model``, ``layer``,
        ``head``, ...; a second layer in ``model_2``, ``layer_2``); ``value``; ``standard_error``.
        Undefined values have no row.

        Args:
            path: of the file.
            quantities: names of arrays; all by default.

        Returns:
            the path.

        Raises:
            VitprobeError: no such quantity, or the file cannot be written.
        """
        text = as_csv(long_table(self, quantities))
        write_atomically({Path(path): text.encode(errors="replace")})
        return Path(path)

    def to_dataframe(self, quantities: Sequence[str] = ()) -> Any:
        """The table of ``to_csv`` as ``pandas.DataFrame``.

        Raises:
            VitprobeError: no such quantity, or pandas is not installed.
        """
        return as_dataframe(long_table(self, quantities))

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays as the file holds them, by name."""
        names = [field.name for field in fields(self) if field.name != "meta"]
        return {name: np.asarray(getattr(self, name)) for name in names}

    def save(self, path: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
        """Write the figure in each format and the numbers as ``.npz``, all or none.

        Args:
            path: with or without a suffix; the files differ in theirs.
            formats: of ``png``, ``pdf``, ``svg``.

        Returns:
            the paths written.
        """
        from vitprobe.results.drawing import render

        stem = Path(path)
        if stem.suffix.lstrip(".") in (*FORMATS, "npz"):
            stem = stem.with_suffix("")
        figure = self.figure()
        contents = {Path(f"{stem}.{name}"): render(figure, name) for name in formats}
        contents[Path(f"{stem}.npz")] = self.npz()
        write_atomically(contents)
        return list(contents)

    def npz(self) -> bytes:
        """The file that ``save`` writes and ``load_result`` reads."""
        arrays: Any = self.arrays()
        for name, array in arrays.items():
            if array.dtype == object:
                raise TypeError(f"{type(self).__name__}.{name} is no plain array")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, meta=np.array(json.dumps(self.meta, allow_nan=False)), **arrays)
        return buffer.getvalue()

    def __repr__(self) -> str:
        """The arrays by name and shape, not by their numbers."""
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.arrays().items())
        return f"<{type(self).__name__} of {', '.join(self.models)}: {shapes}>"

    def __init_subclass__(cls) -> None:
        # dataclass() would give each subclass a repr of all its numbers.
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]
        if "findings" in vars(cls):
            cls.findings = _naming_the_untrained(cls.findings)  # type: ignore[method-assign]

    def _repr_html_(self) -> str:
        """What a notebook shows: the figure, and the claims with their verdicts under it."""
        encoded = base64.b64encode(self._repr_png_()).decode()
        rows = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:left;vertical-align:top">{html.escape(cell)}</td>'
                for cell in (one.verdict, one.claim, one.numbers, one.source)
            )
            + "</tr>"
            for one in self.findings()
        )
        name = f"{self.analysis} of {', '.join(self.models)}"
        return (
            f'<img alt="{html.escape(name)}" style="max-width:100%;background:white" '
            f'src="data:image/png;base64,{encoded}">' + (f"<table>{rows}</table>" if rows else "")
        )

    def _repr_png_(self) -> bytes:
        from vitprobe.results.drawing import render

        return render(self.figure(), "png")


def load_result(path: str | Path) -> Result:
    """The result in a file that ``save`` wrote.

    Raises:
        VitprobeError: no such file, or not a result of vitprobe.
    """
    path = Path(path)
    arrays, meta = read_npz(path)
    analysis = meta["analysis"]
    # The name comes from a file: only measurements are imported by it.
    if analysis not in measurements():
        raise VitprobeError(f"{path} holds {analysis!r}, which is not a measurement of vitprobe.")
    result_type = import_module(f"vitprobe.{analysis}").RESULT
    wanted = {field.name for field in fields(result_type)} - {"meta"}
    # Fields with a default came later: files of earlier versions are read without them.
    needed = {field.name for field in fields(result_type) if field.default is MISSING} & wanted
    if needed - arrays.keys():
        missing = ", ".join(sorted(needed - arrays.keys()))
        raise VitprobeError(f"{path} lacks {missing}: another version of vitprobe wrote it.")
    chosen = {name: arrays[name] for name in wanted if name in arrays}
    check(path, chosen, meta, result_type.axes)
    for model in meta["models"]:
        # Those of other programs and of damaged files are drawn and printed as well.
        model["name"] = shown(model["name"])
    return result_type(meta=meta, **chosen)
