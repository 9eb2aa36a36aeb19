"""What a command prints when it is done: on a terminal, in a pipe, as JSON."""

import io
import json
import re
from dataclasses import asdict

import pytest

from vitprobe import redraw
from vitprobe.results.printing import duration, print_findings
from vitprobe.results.result import FAILS, HOLDS, OPEN, Finding, load_result

FINDINGS = [
    Finding("a is above b in every layer that was looked at, and by far", "Paper 2021, Fig. 1",
            HOLDS, "difference 0.20 ± 0.01; share 0.9", over="12 and 16 blocks"),
    Finding("c holds", "Paper 2021, Fig. 2", FAILS, "x 0.1"),
    Finding("d is above e", "Paper 2021, Fig. 1", OPEN, "difference 0.01 ± 0.10"),
]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_pipe_gets_plain_lines_by_paper_and_figure():
    pipe = io.StringIO()
    print_findings(FINDINGS, pipe)
    assert pipe.getvalue().splitlines() == [
        "",
        "Paper 2021, Fig. 1",
        "  holds: a is above b in every layer that was looked at, and by far",
        "      over 12 and 16 blocks",
        "      difference 0.20 ± 0.01",
        "      share 0.9",
        "  inconclusive: d is above e",
        "      difference 0.01 ± 0.10",
        "",
        "Paper 2021, Fig. 2",
        "  does not hold: c holds",
        "      x 0.1",
    ]


def test_a_terminal_gets_its_width_and_a_colour_a_verdict(terminal, monkeypatch):
    print_findings(FINDINGS, terminal)
    coloured = terminal.getvalue()
    plain = re.sub(r"\033\[[\d;]*m", "", coloured)
    assert all(len(line) <= 44 for line in plain.splitlines())
    # A number keeps its error.
    narrow = io.StringIO()
    print_findings([Finding("x", "P, Fig. 1", HOLDS, "of all layers 0.20 ± 0.01")], narrow, 27)
    assert narrow.getvalue().splitlines()[-2:] == ["      of all layers", "        0.20 ± 0.01"]
    words = re.findall(r"\033\[([\d;]*)m([a-z ]+)\033\[0m", coloured)
    assert [word for _, word in words] == [HOLDS, OPEN, FAILS]
    assert len({code for code, _ in words}) == 3
    # The claim's own "holds" keeps its colour to itself.
    assert "c holds" in coloured
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            other = Terminal()
            print_findings(FINDINGS, other)
        assert other.getvalue() == plain


def test_json_holds_the_same(pictures, tmp_path, capsys):
    from vitprobe import cka

    arguments = ["--models", "test_vit@random", "test_resnet@random", "--images", str(pictures),
                 "--image-size", "32", "--batch-size", "6", "--out", str(tmp_path)]  # fmt: skip
    assert cka.main([*arguments, "--stem", "x", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [str(tmp_path / name) for name in ("x.png", "x.npz")]
    findings = load_result(tmp_path / "x.npz").findings()
    assert told["findings"] == [asdict(finding) for finding in findings] and findings
    assert told["seconds"] > 0
    assert redraw.main([str(tmp_path / "x.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == told["findings"]


def test_times_read_as_people_say_them():
    assert [duration(s) for s in (0.04, 9.96, 59.6, 185, 7800)] == [
        "0.0 s",
        "10 s",
        "1 min 0 s",
        "3 min 5 s",
        "2 h 10 min",
    ]
