"""Names in scripts that matplotlib's own font lacks."""

import warnings

import numpy as np
import pytest
from matplotlib import image

from vitprobe.results import fonts
from vitprobe.results.drawing import new_figure, render, style, titled

# In a font that comes with matplotlib, and not in its default.
LETTER, FONT = "\u24b6", "STIXGeneral"


def drawn(title, tmp_path):
    with style():
        figure = titled(new_figure(3, 1), title)
    (tmp_path / "x.png").write_bytes(render(figure, "png"))
    return image.imread(tmp_path / "x.png")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(fonts, "_told", set())


def test_letters_that_no_font_has_are_told_once_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fonts, "WIDE", ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn("model 日本", tmp_path)
        drawn("model 日", tmp_path)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no font here has these letters" in told
    assert "日 本" in told
    drawn("model 語", tmp_path)
    assert "figure: 語 (" in capsys.readouterr().err


def test_a_font_that_is_there_has_the_letters(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fonts, "WIDE", ())
    without = drawn(LETTER, tmp_path)
    assert LETTER in capsys.readouterr().err
    monkeypatch.setattr(fonts, "WIDE", ("No Such Font", FONT))
    fonts._told.clear()
    assert fonts.families()[-1] == FONT
    assert not np.array_equal(drawn(LETTER, tmp_path), without)
    assert capsys.readouterr().err == ""


def test_other_warnings_go_on(recwarn):
    with fonts.missing_letters_told():
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
    assert [str(one.message) for one in recwarn] == ["something else"]
