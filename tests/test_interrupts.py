"""A request to stop, whenever it comes: one line, the status of the signal, nothing lost."""

import signal
import sys
import time

import pytest

from vitprobe import VitprobeError, cka, report, skip_ratio
from vitprobe.results.result import Result
from vitprobe.running import session as sessions
from vitprobe.running.interrupts import HeldBack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
STOPS = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]


@pytest.fixture
def usual():
    """Signals as they are for a program that has just begun."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        default = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)
    yield {number: signal.getsignal(number) for number in STOPS}
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(tmp_path):
    return ["--models", "test_vit@random", "--image-size", "32", "--batch-size", "4",
            "--num-images", "16", "--workers", "0", "--device", "cpu", "--stem", "x",
            "--out", str(tmp_path / "out")]  # fmt: skip


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("name", ["cka", "report"])
def test_before_the_first_batch(name, number, tmp_path, usual, monkeypatch, capsys):
    command = {"cka": cka, "report": report}[name]
    monkeypatch.setattr(sessions.Session, "layers", lambda *_: signal.raise_signal(number))
    more = [] if name == "cka" else ["--only", "cka", "skip_ratio"]
    assert command.main([*arguments(tmp_path), *more]) == 128 + number
    assert capsys.readouterr().err == "vitprobe: Stopped.\n"
    assert {one: signal.getsignal(one) for one in STOPS} == usual


@pytest.mark.parametrize("name", ["cka", "report"])
def test_while_figures_are_drawn(name, tmp_path, usual, monkeypatch, capsys):
    command = {"cka": cka, "report": report}[name]
    asked = [*arguments(tmp_path), *([] if name == "cka" else ["--only", "cka"])]
    with monkeypatch.context() as patch:
        patch.setattr(Result, "npz", lambda self: signal.raise_signal(signal.SIGTERM))
        assert command.main(asked) == 128 + signal.SIGTERM
    told = capsys.readouterr().err
    assert told.startswith("vitprobe: Stopped") and told.count("\n") == 1
    assert told.endswith("Run the same command to resume.\n")
    assert not list((tmp_path / "out").glob("*.n*"))
    assert command.main(asked) == 0
    assert "Resuming after batch 4 of 4" in capsys.readouterr().err


def test_twice_within_a_moment_is_one_request(usual):
    with HeldBack() as outer:
        with pytest.raises(KeyboardInterrupt), HeldBack():
            signal.raise_signal(signal.SIGTERM)
        # What winds down now is not cut off.
        signal.raise_signal(signal.SIGINT)
        assert outer.asked and outer.status == 128 + signal.SIGTERM


def test_one_within_another_takes_the_signals(usual):
    with HeldBack() as outer:
        with HeldBack() as inner:
            with pytest.raises(KeyboardInterrupt), inner.batch():
                signal.raise_signal(signal.SIGTERM)
                done = True
            assert done and inner.asked and not outer.asked
        with HeldBack(takes=False):
            # Who waits where no handler of Python's is called must be ended by the system.
            assert {one: signal.getsignal(one) for one in STOPS} == usual
        assert signal.getsignal(signal.SIGTERM) == outer._arrived
    assert {one: signal.getsignal(one) for one in STOPS} == usual


def test_one_that_comes_while_an_object_is_finalised_comes_again(usual, capsys):
    """Python drops what is raised there, and prints a traceback."""

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    before = sys.unraisablehook
    with HeldBack() as stops, pytest.raises(KeyboardInterrupt):
        thing = Finalised()
        del thing
        for _ in range(1000):
            time.sleep(0.01)
    assert stops.status == 128 + signal.SIGTERM and capsys.readouterr().err == ""
    assert sys.unraisablehook is before


def test_a_report_stopped_while_it_draws_measures_nothing_again(
    tmp_path, usual, monkeypatch, capsys
):
    asked = [*arguments(tmp_path), "--only", "cka", "skip_ratio"]
    with monkeypatch.context() as patch:
        patch.setattr(skip_ratio.RESULT, "plot", lambda self: signal.raise_signal(signal.SIGTERM))
        assert report.main(asked) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "vitprobe: Stopped. Run the same command to resume.\n"
    with monkeypatch.context() as patch:
        patch.setattr(cka._Watch, "end", None)
        assert report.main(asked) == 0
    left = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert left == ["x-cka.npz", "x-cka.png", "x-skip_ratio.npz", "x-skip_ratio.png", "x.html"]


def test_what_was_begun_together_is_not_left_where_each_is_measured_alone(
    tmp_path, monkeypatch, capsys
):
    passes = []
    end = skip_ratio._Watch.end

    def fails_once(self, batch):
        passes.append(batch.index)
        if len(passes) == 3:
            raise VitprobeError("odd")
        end(self, batch)

    monkeypatch.setattr(skip_ratio._Watch, "end", fails_once)
    assert report.main([*arguments(tmp_path), "--only", "cka", "skip_ratio"]) == 0
    assert passes == [0, 1, 2, 0, 1, 2, 3]
    left = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert left == ["x-cka.npz", "x-cka.png", "x-skip_ratio.npz", "x-skip_ratio.png", "x.html"]
