"""The batch loop: broken images, resume after a kill, interrupts, several processes."""

import os
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from vitprobe import VitprobeError, cka, wrap
from vitprobe.running import interrupts
from vitprobe.running.checkpoint import Checkpoint
from vitprobe.running.interrupts import Interrupted
from vitprobe.running.loop import run
from vitprobe.running.options import Options
from vitprobe.running.session import session


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize(
    ("n", "size", "least", "lengths"),
    [(100, 32, 4, [25] * 4), (36, 32, 4, [18, 18]), (64, 32, 4, [32, 32]), (7, 3, 1, [3, 2, 2]),
     (3, 32, 1, [3]), (9, 4, 4, [4, 4, 1])],
)  # fmt: skip
def test_batches_are_even_unless_they_would_be_too_small(n, size, least, lengths):
    images = torch.zeros(n, 3, 8, 8)
    with session(wrap(net()), images, Options(batch_size=size), at_least=least) as ready:
        assert [len(batch) for batch in ready.batches] == lengths
        assert np.array_equal(np.concatenate(ready.batches), np.arange(n))


BATCH = 4


class StopIn(nn.Module):
    """A network that gets a signal in its k-th batch."""

    def __init__(self, batch=99, stop=lambda: signal.raise_signal(signal.SIGINT)):
        super().__init__()
        self.net, self.passes, self.at, self.stop = net(), 0, batch, stop

    def forward(self, x):
        # What is looked at before the first batch has fewer images.
        self.passes += len(x) == BATCH
        if self.passes == self.at and len(x) == BATCH:
            self.stop()
        return self.net(x)


def measured(module, tensors, path, **options):
    return cka.measure(
        wrap(module, name="net"),
        tensors,
        batch_size=BATCH,
        layers="net.*",
        checkpoint=path,
        **options,
    )


def test_broken_images_are_named_skipped_and_counted(pictures, capsys):
    from PIL import Image

    for i in range(100):
        Image.effect_noise((20, 20), 99).convert("RGB").save(pictures / f"more{i}.png")
    (pictures / "more7.png").write_bytes(b"\x89PNG\r\n\x1a\ntorn")
    result = cka.measure("test_vit@random", pictures, image_size=32, workers=0)
    assert result.meta["images"]["broken"] == ["more7.png"] and result.meta["n"] == 111
    assert "Skipped more7.png" in capsys.readouterr().err
    (pictures / "more8.png").write_bytes(b"")
    with pytest.raises(VitprobeError, match=r"2 of 112 images of pictures cannot be read .* 1%"):
        cka.measure("test_vit@random", pictures, image_size=32, workers=0)


def test_workers_give_the_same_numbers(pictures):
    one = cka.measure("test_vit@random", pictures, image_size=32, batch_size=6, workers=0)
    two = cka.measure("test_vit@random", pictures, image_size=32, batch_size=6, workers=2)
    np.testing.assert_array_equal(one.cka, two.cka)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tensors, tmp_path, number):
    path = tmp_path / "state"
    whole = measured(StopIn(), tensors, None)
    with pytest.raises(
        Interrupted, match=r"after batch 2 of 5; run the same command to resume"
    ) as caught:
        measured(StopIn(2, lambda: signal.raise_signal(number)), tensors, path)
    assert caught.value.status == 128 + number
    assert len(list(tmp_path.glob("*.partial"))) == 1
    resumed = StopIn()
    result = measured(resumed, tensors, path)
    assert resumed.passes == 3
    np.testing.assert_allclose(result.cka, whole.cka, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.cka_se, whole.cka_se, rtol=0, atol=1e-12)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_is_in_some_sums_only_is_not_saved(tensors, tmp_path):
    """A second Ctrl-C does not wait for the batch: what was saved before it stays."""
    sums = {}

    def stopped(stops):
        with session(net(), tensors, Options(batch_size=4, checkpoint=tmp_path / "s")) as ready:
            sums.update(ready.sums(first=(), second=()))

            def step(batch):
                sums["first"] += len(batch)
                if stops and batch.index == 2:
                    signal.raise_signal(signal.SIGINT)
                    time.sleep(interrupts.AGAIN_S + 0.1)
                    signal.raise_signal(signal.SIGINT)
                sums["second"] += len(batch)

            run(ready, step, sums, decides={})

    with pytest.raises(Interrupted, match=r"Stopped after batch 2 of 5; nothing was saved."):
        stopped(stops=True)
    stopped(stops=False)
    assert sums["first"] == sums["second"] == 20


def test_signals_are_handled_as_before_after_a_run(tensors):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    measured(StopIn(), tensors, None)
    with pytest.raises(Interrupted, match="nothing was saved"):
        measured(StopIn(2), tensors, None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_fresh_starts_over_and_other_facts_leave_the_state_alone(tensors, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Interrupted):
        measured(StopIn(2), tensors, path)
    kept = next(tmp_path.glob("*.partial")).read_bytes()
    measured(StopIn(), tensors, path, seed=1)
    assert next(tmp_path.glob("*.partial")).read_bytes() == kept
    fresh = StopIn()
    measured(fresh, tensors, path, fresh=True)
    assert fresh.passes == 5 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "other version", "other shape"])
def test_a_damaged_state_is_done_again(tensors, tmp_path, damage):
    path = tmp_path / "state"
    with pytest.raises(Interrupted):
        measured(StopIn(2), tensors, path)
    file = next(tmp_path.glob("*.partial"))
    content = bytearray(file.read_bytes())
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "torn":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        with np.load(file) as old:
            content[content.index(old["cka.hsic"].tobytes()) + 7] ^= 0xFF
        file.write_bytes(content)
    else:
        with np.load(file) as old:
            arrays = {name: old[name] for name in old.files}
        arrays |= {"_key": np.array("another")} if damage == "other version" else {
            "cka.hsic": arrays["cka.hsic"][1:]
        }  # fmt: skip
        with file.open("wb") as out:
            np.savez(out, **arrays)
    again = StopIn()
    result = measured(again, tensors, path)
    assert again.passes == 5
    np.testing.assert_array_equal(result.cka, measured(StopIn(), tensors, None).cka)


def test_no_batch_counts_twice_when_partial_files_overlap(tmp_path):
    def state(value):
        return {"total": torch.full((2,), float(value), dtype=torch.float64)}

    def checkpoint(rank):
        return Checkpoint(tmp_path / "s", {"a": 1}, 4, rank)

    checkpoint(0).save(state(7), np.array([True, True, True, False]))
    checkpoint(1).save(state(5), np.array([False, False, True, False]))
    checkpoint(2).save(state(1), np.array([False, False, False, True]))
    total = state(0)
    done = checkpoint(0).load(total)
    assert done.all() and total["total"].tolist() == [8, 8]
    # They are one file from here on, so that nobody writes over what was another's.
    assert [file.name[-9:] for file in tmp_path.iterdir()] == ["0.partial"]
    again = state(0)
    assert checkpoint(0).load(again).all() and again["total"].tolist() == [8, 8]


def test_gpu_memory_that_runs_out_says_which_batch_size_to_try(tensors):
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.passes = nn.Conv2d(3, 3, 1), 0

        def forward(self, x):
            if len(x) > BATCH:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.conv(x)

    with pytest.raises(VitprobeError, match="--batch-size 16; try --batch-size 8"):
        cka.measure(wrap(Full()), tensors, batch_size=16, layers="all")


def test_a_session_restores_what_it_changed_after_an_exception(tensors):
    module = net().train()
    module[1].eval()
    with pytest.raises(ZeroDivisionError), session(module, tensors, Options()):
        assert not module.training
        raise ZeroDivisionError
    assert module.training and module[0].training and not module[1].training


SCRIPT = """
import sys, time, torch
from torch import nn
from vitprobe import cka, wrap
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    def forward(self, x):
        time.sleep(float(sys.argv[2]))
        return self.net(x)
images = torch.randn(120, 3, 12, 12, generator=torch.Generator().manual_seed(0))
import atexit, os
from pathlib import Path
# A group that is there to the very end aborts the process now and then.
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(3))
r = cka.measure(wrap(Slow()), images, batch_size=4, layers="net.*", save_every=0.0,
                checkpoint=Path(sys.argv[1]) / "state")
if int(os.environ.get("RANK", 0)) == 0:
    r.save(Path(sys.argv[1]) / "result")
"""


def run_here(script, out, monkeypatch):
    """The script undisturbed, in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), str(out), "0"])
    runpy.run_path(str(script), run_name="__main__")


def test_killed_at_any_moment_and_resumed_the_numbers_are_the_same(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    kills = 0
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, str(script), str(out), "0.05"])
        deadline = time.monotonic() + 60
        # Let it get a different way each time, then kill it without warning.
        while process.poll() is None and time.monotonic() < deadline:
            if list(out.glob("*.partial")) and attempt < 2:
                time.sleep(0.17 * (attempt + 1))
                process.kill()
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills == 2 and process.returncode == 0
    whole = tmp_path / "whole"
    run_here(script, whole, monkeypatch)
    with np.load(out / "result.npz") as a, np.load(whole / "result.npz") as b:
        np.testing.assert_allclose(a["cka"], b["cka"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(a["cka_se"], b["cka_se"], rtol=0, atol=1e-9)
    assert not list(out.glob("*.partial"))


def test_two_processes_agree_with_one(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run_here(script, tmp_path / "1", monkeypatch)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(tmp_path / "2"), "0"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "1" / "result.npz") as a, np.load(tmp_path / "2" / "result.npz") as b:
        np.testing.assert_allclose(a["cka"], b["cka"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(a["cka_se"], b["cka_se"], rtol=0, atol=1e-9)
    assert not list((tmp_path / "2").glob("*.partial"))
