"""What lies in the way on a disk, or goes from it, while a run goes on."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from vitprobe import attention_distance, cka
from vitprobe.results.result import Result
from vitprobe.results.writing import of_this_machine, write_atomically
from vitprobe.running.checkpoint import Checkpoint


def arguments(out):
    return ["--models", "test_vit@random", "--image-size", "32", "--batch-size", "4",
            "--num-images", "16", "--workers", "0", "--device", "cpu", "--stem", "x",
            "--save-every", "0", "--out", str(out)]  # fmt: skip


def test_a_state_that_cannot_be_removed_costs_no_result(tmp_path, monkeypatch, capsys):
    """Another user's, in a folder that people share."""
    unlink = Path.unlink

    def refused(self, missing_ok=False):
        if self.suffix == ".partial":
            raise PermissionError(1, "Operation not permitted")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    assert cka.main(arguments(tmp_path)) == 0
    assert "x.npz" in capsys.readouterr().out


def test_a_folder_in_the_place_of_a_state(tmp_path, capsys):
    kept = Checkpoint(tmp_path / ".s", {"a": 1}, 2, 0)
    state = {"total": torch.ones(2, dtype=torch.float64)}
    kept.save(state, np.array([True, False]))
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    (file / "inside").touch()
    assert kept.load(state).tolist() == [False, False]
    kept.remove()
    assert (file / "inside").exists()


def test_other_peoples_leftovers_are_in_nobodys_way(tmp_path, monkeypatch):
    left = tmp_path / f".x.npz{of_this_machine()}{2**22 + 1}-a.tmp"
    left.touch()
    unlink = Path.unlink

    def refused(self, missing_ok=False):
        if self == left:
            raise PermissionError(1, "Operation not permitted")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    write_atomically({tmp_path / "x.npz": b"whole"})
    assert sorted(os.listdir(tmp_path)) == sorted([left.name, "x.npz"])


def test_nothing_is_said_to_be_kept_that_has_gone(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def goes(self):
        shutil.rmtree(out)
        out.write_text("")
        return b""

    monkeypatch.setattr(Result, "npz", goes)
    assert attention_distance.main(arguments(out)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.endswith("out is a file, not a folder.\n")
