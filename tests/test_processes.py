"""``torchrun``: runs that are killed or stopped, and gone on with by other numbers of processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from vitprobe import VitprobeError, cka
from vitprobe.running.checkpoint import Checkpoint
from vitprobe.running.loading import TransformedImages

# 12 batches of 4 pictures.
PICTURES, SIZE, BATCHES = 48, 4, 12
# Far more than anything here takes: a loaded machine may take its time.
PATIENCE_S = 300

# The command, but the pictures from a position on come once a file has gone.
COMMAND = """
import os, sys, time
from pathlib import Path
from vitprobe import cka
from vitprobe.running.loading import TransformedImages
folder, position = Path(sys.argv[1]), int(sys.argv[2])
(folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
read = TransformedImages.__getitem__
def late(self, p):
    while p >= position and (folder / "hold").exists():
        time.sleep(0.02)
    return read(self, p)
TransformedImages.__getitem__ = late
sys.exit(cka.main(sys.argv[3:]))
"""


def arguments(folder, out):
    return ["--models", "test_vit@random", "--images", str(folder / "pictures.npz"),
            "--image-size", "32", "--batch-size", str(SIZE), "--workers", "0", "--device", "cpu",
            "--save-every", "0", "--out", str(folder / out), "--stem", "x"]  # fmt: skip


def torchrun(folder, count, hold_from):
    (folder / "hold").touch()
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={count}", str(folder / "command.py"), str(folder), str(hold_from),
         *arguments(folder, "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def done(folder):
    """How many batches the state of each process on disk holds."""
    found = {}
    for file in (folder / "out").glob(".x.*.partial"):
        # Runs that begin join the files that they find.
        with suppress(FileNotFoundError), np.load(file) as state:
            found[int(file.name.split(".")[-2])] = int(state["_done"].sum())
    return found


def wait_for(run, condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if run.poll() is not None or time.monotonic() > deadline:
            run.kill()
            pytest.fail(f"torchrun: status {run.returncode}\n{run.communicate()[1]}")
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_and_stopped_under_torchrun_other_numbers_of_processes_go_on(
    tmp_path, monkeypatch, capsys
):
    noise = np.random.default_rng(0).integers(0, 256, (PICTURES, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=noise)
    (tmp_path / "command.py").write_text(COMMAND)
    assert cka.main(arguments(tmp_path, "whole")) == 0

    # One process, stopped by Ctrl-C in its third batch.
    read = TransformedImages.__getitem__

    def stops(self, position):
        if position == 2 * SIZE:
            signal.raise_signal(signal.SIGINT)
        return read(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(TransformedImages, "__getitem__", stops)
        assert cka.main(arguments(tmp_path, "out")) == 130
    assert "Stopped after batch 2 of 12; run the same command to resume." in capsys.readouterr().err
    assert done(tmp_path) == {0: 2}

    # Two processes go on; one of them is killed while both have batches to do.
    two = torchrun(tmp_path, 2, hold_from=6 * SIZE)
    wait_for(two, lambda: done(tmp_path).get(0, 0) > 2 and 1 in done(tmp_path))
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    told = two.communicate(timeout=PATIENCE_S)[1]
    assert two.returncode != 0 and "Resuming after batch 2 of 12" in told
    assert told.count("run the same command to resume.") == 1
    kept = done(tmp_path)
    assert kept[0] > 2 and kept[1] > 0 and not (tmp_path / "out" / "x.npz").exists()

    # Three go on; Ctrl-C comes while one has batches to do and the others may be waiting for it.
    three = torchrun(tmp_path, 3, hold_from=11 * SIZE)
    wait_for(three, lambda: done(tmp_path).get(0, 0) > sum(kept.values()) and 2 in done(tmp_path))
    os.killpg(three.pid, signal.SIGINT)
    told = three.communicate(timeout=PATIENCE_S)[1]
    assert three.returncode != 0 and f"Resuming after batch {sum(kept.values())} of 12" in told
    assert told.count("run the same command to resume.") == 1
    kept = sum(done(tmp_path).values())
    assert kept < BATCHES

    # One, without torchrun, comes to the end.
    assert cka.main(arguments(tmp_path, "out")) == 0
    assert f"Resuming after batch {kept} of 12" in capsys.readouterr().err
    with np.load(tmp_path / "out" / "x.npz") as a, np.load(tmp_path / "whole" / "x.npz") as b:
        np.testing.assert_allclose(a["cka"], b["cka"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(a["cka_se"], b["cka_se"], rtol=0, atol=1e-9)
    assert sorted(os.listdir(tmp_path / "out")) == ["x.npz", "x.png"]


def test_a_number_of_processes_without_a_place_to_meet_is_told(tensors, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(VitprobeError, match="WORLD_SIZE is 2, but MASTER_ADDR and MASTER_PORT are"):
        cka.measure("test_vit@random", tensors, image_size=32, device="cpu")


def test_every_process_leaves_the_state_to_the_main_one_also_in_a_folder_of_its_own(tmp_path):
    facts, ones = {"x": 1}, {"a": torch.ones(2, dtype=torch.float64)}

    def of(folder, rank):
        (tmp_path / folder).mkdir(exist_ok=True)
        return Checkpoint(tmp_path / folder / "s", facts, 3, rank)

    def files(folder):
        return sorted(file.name.split(".")[-2] for file in (tmp_path / folder).iterdir())

    some = np.array([True, False, False])
    for folder, rank in (("one", 0), ("one", 1), ("two", 0), ("two", 2), ("two", 3)):
        of(folder, rank).save(ones, some)
    other = Checkpoint(tmp_path / "two" / "s", {"x": 2}, 3, 2)
    other.save(ones, some)
    # Rank 1 shares the main process's folder; rank 2 has one with what an earlier run left.
    assert of("one", 0).save_whole(ones)
    of("one", 1).leave_to_main(shared=True)
    of("two", 2).leave_to_main(shared=False)
    assert files("one") == ["0"]
    assert [file.name for file in (tmp_path / "two").iterdir()] == [f"s.{other.key[:12]}.2.partial"]
    total = {"a": torch.zeros(2, dtype=torch.float64)}
    assert of("one", 0).load(total).all() and total["a"].tolist() == [1, 1]
