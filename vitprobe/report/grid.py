"""The claims as a grid: a row for each claim of a figure, a column for each model or pair."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vitprobe.results.result import FAILS, HOLDS, OPEN, Finding

# Verdicts are told by a sign and words, not by colour alone.
SIGNS = {HOLDS: ("✓", "holds"), FAILS: ("✗", "fails"), OPEN: ("?", "open")}


@dataclass(frozen=True)
class Claim:
    """A finding and where its figure is on the page."""

    finding: Finding
    models: tuple[str, ...]
    anchor: str

    @property
    def sign(self) -> str:
        return SIGNS[self.finding.verdict][0]

    @property
    def kind(self) -> str:
        return SIGNS[self.finding.verdict][1]

    @property
    def paper(self) -> str:
        return self.finding.source.partition(", ")[0]

    @property
    def figure(self) -> str:
        """Without what the source says beyond the figure's number."""
        return re.split("[,;]", self.finding.source.partition(", ")[2])[0]

    @property
    def numbers(self) -> list[str]:
        """What decided it, a part each, the layers first."""
        over = [f"over {self.finding.over}"] if self.finding.over else []
        return over + self.finding.numbers.split("; ")

    @property
    def brief(self) -> str:
        """The claim in a few words, the same for all models."""
        if self.finding.brief:
            return self.finding.brief
        return _pattern(self.models).sub("…", self.finding.claim) if self.models else (
            self.finding.claim
        )  # fmt: skip


def claim(finding: Finding, names: Sequence[str], anchor: str) -> Claim:
    """A claim, with the models that it is about, in the order of the result's; else all of them.

    Args:
        finding: of a result.
        names: of the result's models.
        anchor: of the figure.
    """
    about = finding.models or names
    return Claim(finding, tuple(name for name in names if name in about), anchor)


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Any of the names as a whole; the longest first, as one may begin with another."""
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w.])(?:{either})(?!\w)")


@dataclass(frozen=True)
class Row:
    """One claim for every model or pair; ``cells`` are in the order of the columns.

    Attributes:
        figure: of the paper.
        span: rows of this figure from here on, 0 for those after its first.
        brief: the claim in a few words.
        cells: the claims for each column, mostly one or none.
    """

    figure: str
    span: int
    brief: str
    cells: list[list[Claim]]


def columns(claims: Sequence[Claim], models: Sequence[str]) -> list[tuple[str, ...]]:
    """Models alone in their order, then pairs; nothing for those without claims."""
    found = {one.models for one in claims}
    alone = [(name,) for name in models if (name,) in found]
    others = [one for one in dict.fromkeys(one.models for one in claims) if one not in alone]
    return [*alone, *others]


def rows(claims: Sequence[Claim], models: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """(paper, its rows): papers in the order in which they come first, figures by their number."""
    places = columns(claims, models)
    papers = list(dict.fromkeys(one.paper for one in claims))
    keys = dict.fromkeys((one.paper, one.figure, one.brief) for one in claims)
    ordered = sorted(keys, key=lambda key: (papers.index(key[0]), _natural(key[1])))
    found: dict[str, list[Row]] = {paper: [] for paper in papers}
    for (paper, figure), group in groupby(ordered, key=lambda key: key[:2]):
        briefs = [brief for _, _, brief in group]
        for i, brief in enumerate(briefs):
            mine = [one for one in claims if (one.paper, one.figure, one.brief) == (
                paper, figure, brief)]  # fmt: skip
            cells = [[one for one in mine if one.models == place] for place in places]
            found[paper].append(Row(figure, len(briefs) if i == 0 else 0, brief, cells))
    return list(found.items())


def _natural(figure: str) -> list[tuple[int, str]]:
    """Sorts Fig. 9 before Fig. 11, and both before an appendix."""
    parts = re.split(r"(\d+)", figure.replace("Fig.", ""))
    return [(int(part), "") if part.isdigit() else (10**6 * bool(part.strip()), part.strip())
            for part in parts]  # fmt: skip


def tally(findings: Sequence[Finding]) -> str:
    """How many claims hold, in a sentence."""
    count = Counter(finding.verdict for finding in findings)
    told = [
        f"{count[HOLDS]} {'hold' if count[HOLDS] != 1 else 'holds'}",
        f"{count[FAILS]} {'do' if count[FAILS] != 1 else 'does'} not",
        f"{count[OPEN]} {'are' if count[OPEN] != 1 else 'is'} inconclusive",
    ]
    claims = f"{len(findings)} claim{'s' * (len(findings) != 1)}"
    return f"Of {claims}, {told[0]}, {told[1]}, and {told[2]}."
