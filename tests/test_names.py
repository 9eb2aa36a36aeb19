"""Names are text: what folders, files, models, layers and titles are called does nothing."""

import argparse
import csv
import io
import os
import xml.etree.ElementTree
from pathlib import PureWindowsPath

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitprobe import VitprobeError, cka, cli, load_result, report, wrap
from vitprobe.errors import shown
from vitprobe.report import command as report_command
from vitprobe.results.drawing import new_figure, render, short, style
from vitprobe.results.printing import as_printed

assert report

HOSTILE = [
    r"a $\frac$ b",
    "from $5 to $9",
    "one $ only",
    r"back\slash ^_{}",
    "esc \x1b[2J\x1b]0;title\x07",
    "line\nvitprobe: all is well",
    "not utf-8 \udcff",
    "right \u202e to left \u200f",
    "nul-like \x01 \x7f \x9b31m",
    "<b>&amp;</b> --> ]]>",
    "=1+2",
    "non \uffff character",
]


class Odd(nn.Module):
    """Two layers whose names are hostile."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        name = name.replace(".", "")
        self.add_module(name, nn.Conv2d(3, 4, 8, 8))
        self.add_module(f"{name} 2", nn.Conv2d(4, 4, 1))

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_models_layers_and_titles_are_called_is_drawn_as_it_is(name, tensors, tmp_path):
    result = cka.measure(wrap(Odd(name), name), tensors, layers="all")
    result.meta["title"] = name
    paths = result.save(tmp_path / "x", ("png", "pdf", "svg"))
    assert all(path.stat().st_size > 1000 for path in paths)
    xml.etree.ElementTree.parse(tmp_path / "x.svg")  # well-formed
    again = load_result(tmp_path / "x.npz")
    assert again.models == [shown(name)]
    result.to_csv(tmp_path / "x.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert len({len(row) for row in rows}) == 1
    for row in rows[1:]:
        for cell in row:
            assert not cell.startswith(("=", "@")) and "\x1b" not in cell
            if cell.startswith(("+", "-")):
                float(cell)
    assert "\x1b" not in repr(result) and result._repr_html_()


def test_dollars_are_drawn_and_set_nothing_in_italics(tensors):
    """The drawn texts are those that were given, none of them parsed as mathematics."""
    from matplotlib.text import Text

    name = "from $5 to $9"
    result = cka.measure(wrap(Odd(name), name), tensors, layers="all")
    result.meta["title"] = name
    figure = result.figure()
    with_dollar = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(with_dollar) > 3
    assert not any(text.get_parse_math() for text in with_dollar)
    # Also on axes of the user's own.
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    result.plot(ax)
    texts = [text for text in ax.findobj(Text) if "$" in text.get_text()]
    assert texts and not any(text.get_parse_math() for text in texts)


def test_what_is_shown_is_one_line_without_controls_and_else_as_it_is():
    for name in HOSTILE:
        text = shown(name)
        assert text.isprintable() or "\ufffd" in text
        assert len(text.splitlines()) == 1
        text.encode()
    for name in ("plain", "ä 图 日本 עברית", "$\\alpha$", "🦉", "a\u0301"):
        assert shown(name) == name
    assert shown("\x1b\n\udcff\u202e") == "\\x1b\\n\ufffd\\u202e"
    assert str(VitprobeError("no file 'a\nb'")) == "no file 'a\\nb'"
    assert short("a\nb") == "a\\nb"


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_folders_and_files_with_hostile_names(tmp_path, capsys):
    folder = tmp_path / "$\\frac$ \udcff\x1b[2J"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(100):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken \x1b]0;x\x07\nvitprobe: all is well.png").write_bytes(b"torn")
    out = tmp_path / "out \udcfe"
    arguments = ["--models", "test_vit@random", "--image-size", "32", "--images", str(folder),
                 "--workers", "0", "--out", str(out), "--title", "$\\frac$ \udcff"]  # fmt: skip
    assert cka.main(arguments) == 0
    told = capsys.readouterr()
    assert "\x1b" not in told.err + told.out and "\nvitprobe: all is well" not in told.err
    assert r"broken \x1b]0;x\x07\nvitprobe: all is well.png" in told.err
    result = load_result(next(out.glob("*.npz")))
    assert result.meta["images"]["source"] == "$\\frac$ \ufffd\\x1b[2J"
    assert result.meta["title"] == "$\\frac$ \ufffd"
    assert result.meta["n"] == 100


def test_a_terminal_gets_no_escapes_from_paths(tmp_path):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    path = tmp_path / "a\x1b[2J"
    assert as_printed(path, Terminal()).endswith(r"a\x1b[2J")
    assert as_printed(path, io.StringIO()) == str(path)
    assert as_printed(tmp_path / "b\udcff", io.StringIO()).endswith("b\ufffd")


def test_the_reports_title_is_on_the_page_and_in_the_files(tmp_path, capsys):
    arguments = ["--models", "vit_small_box", "--only", "position_embedding", "--stem", "x",
                 "--title", "Mine <b>$x$</b>", "--out", str(tmp_path)]  # fmt: skip
    assert report_command.main(arguments) == 0
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("Mine &lt;b&gt;$x$&lt;/b&gt;") >= 2 and "Mine <b>" not in page
    assert load_result(tmp_path / "x-position_embedding.npz").meta["title"] == "Mine <b>$x$</b>"
    capsys.readouterr()


def test_svg_without_characters_that_xml_has_not(tmp_path):
    with style():
        figure = new_figure(3, 2)
        figure.subplots().set_title(short("a\x01b\x1bc"))
    xml.etree.ElementTree.fromstring(render(figure, "svg"))


# Names that some systems keep for themselves


@pytest.mark.parametrize(
    ("text", "word"),
    [("aux", "_aux"), ("CON", "_CON"), ("nul.0", "_nul.0"), ("com1.weights", "_com1.weights"),
     ("console", "console"), ("auxiliary", "auxiliary"), ("..", "_"), (".", "_"), ("a..", "a"),
     ("C:\\nets\\a", "C_nets_a"), ("a/../b", "a_.._b"), ("=SUM(A1)", "SUM_A1"),
     ("\u202egnp", "gnp"),
     ("rm -rf $HOME", "rm_-rf_HOME"), ("\x1b[31mred", "31mred")],
)  # fmt: skip
def test_parts_of_file_names_are_none_on_all_systems(text, word):
    found = cli.as_word(text)
    assert found == word
    # What Windows would read out of it is the very name.
    path = PureWindowsPath(found)
    assert path.parts == (found,) and not path.drive


def test_stems_that_windows_takes_for_something_else_are_known():
    for stem in ("aux", "NUL.x", "results:today", "a*b", "who?"):
        assert not cli._is_windows_name(stem)
    for stem in ("auxiliary", "cka-aux", "x.y", "ä 图"):
        assert cli._is_windows_name(stem)


def test_long_names_in_any_script_end_in_a_file_name_of_bounded_length(tmp_path):
    args = argparse.Namespace(stem=None, names=["图" * 60, "é" * 60, "z" * 60], models=None)
    name = cli.stem(args, "cka")
    assert len(name.encode()) <= cli.MAX_STEM and name.startswith("cka-图图")
    cli.check_writable(tmp_path, name)
    args.names[1] = "è" * 60
    assert cli.stem(args, "cka") != name
