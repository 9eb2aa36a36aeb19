"""Streams that cannot be written, or are not there: said in a line, and nothing is lost."""

import errno
import io
import os
import sys

import pytest

from vitprobe import cka, report
from vitprobe.__main__ import main
from vitprobe.results.printing import on_terminal


class Full(io.StringIO):
    """A file on a disk that is full."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self):
        return 1


class FullInTheEnd(Full):
    """The same, found out when what was written is sent on."""

    def write(self, text):
        return len(text)

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def arguments(tmp_path):
    return ["--models", "test_vit@random", "--image-size", "32", "--batch-size", "4",
            "--num-images", "16", "--workers", "0", "--device", "cpu", "--stem", "x",
            "--out", str(tmp_path / "out")]  # fmt: skip


@pytest.mark.parametrize("stdout", [Full, FullInTheEnd])
@pytest.mark.parametrize("name", ["cka", "report", "json", "models", "overview"])
def test_a_full_disk_behind_stdout(name, stdout, tmp_path, monkeypatch, capsys):
    asked = {
        "cka": ["cka", *arguments(tmp_path)],
        "json": ["cka", *arguments(tmp_path), "--json"],
        "report": ["report", *arguments(tmp_path), "--only", "cka"],
        "models": ["models"],
        "overview": [],
    }
    monkeypatch.setattr(sys, "stdout", stdout())
    # What leads elsewhere from then on is this very process's stdout.
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert main(asked[name]) == 2
    told = capsys.readouterr().err
    assert told == "vitprobe: stdout cannot be written: No space left on device.\n"
    if name in ("cka", "json"):
        left = sorted(file.name for file in (tmp_path / "out").iterdir())
        assert left == ["x.npz", "x.png"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_a_full_disk_behind_stderr_ends_no_run(pictures, tmp_path, monkeypatch, capsys):
    (pictures / "dog" / "link.png").symlink_to("nowhere")
    for i in range(88):
        (pictures / "cat" / f"more{i}.png").write_bytes((pictures / "cat" / "1.png").read_bytes())
    asked = ["--images", str(pictures), "--num-images", "101"]
    monkeypatch.setattr(sys, "stderr", Full())
    assert cka.main([*arguments(tmp_path), *asked]) == 0
    assert "x.npz" in capsys.readouterr().out


def test_a_program_without_streams(tmp_path, monkeypatch, tensors):
    monkeypatch.setattr(sys, "stderr", None)
    cka.measure("test_vit@random", tensors, batch_size=4)
    monkeypatch.setattr(sys, "stdout", None)
    for command, more in ((cka, []), (report, ["--only", "cka"])):
        assert command.main([*arguments(tmp_path), *more]) == 0
    assert not on_terminal(None) and not on_terminal(io.StringIO())
