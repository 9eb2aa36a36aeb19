"""The batch loop: broken images, resume after a kill, interrupts, several processes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from vitprobe import VitprobeError, cka, wrap
from vitprobe.core.checkpoint import Checkpoint
from vitprobe.core.running import Interrupted, Options, session


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


class StopAfter(nn.Module):
    """A network that raises on its k-th batch."""

    def __init__(self, passes, error=KeyboardInterrupt):
        super().__init__()
        self.net, self.left, self.error = net(), passes, error

    def forward(self, x):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return self.net(x)


def measured(module, tensors, path, **options):
    return cka.measure(
        wrap(module, name="net"), tensors, batch_size=4, layers="net.*", checkpoint=path, **options
    )


def test_broken_images_are_named_skipped_and_counted(pictures, capsys):
    from PIL import Image

    for i in range(100):
        Image.effect_noise((20, 20), 99).convert("RGB").save(pictures / f"more{i}.png")
    (pictures / "more7.png").write_bytes(b"\x89PNG\r\n\x1a\ntorn")
    result = cka.measure("test_vit@random", pictures, image_size=32, workers=0)
    assert result.meta["images"]["broken"] == ["more7.png"] and result.meta["n"] == 111
    assert "skipped more7.png" in capsys.readouterr().err
    (pictures / "more8.png").write_bytes(b"")
    with pytest.raises(VitprobeError, match=r"2 of 112 images of pictures cannot be read .* 1%"):
        cka.measure("test_vit@random", pictures, image_size=32, workers=0)


def test_workers_give_the_same_numbers(pictures):
    one = cka.measure("test_vit@random", pictures, image_size=32, batch_size=6, workers=0)
    two = cka.measure("test_vit@random", pictures, image_size=32, batch_size=6, workers=2)
    np.testing.assert_array_equal(one.cka, two.cka)


def test_an_interrupted_run_goes_on_to_the_same_numbers(tensors, tmp_path):
    path = tmp_path / "state"
    whole = measured(StopAfter(99), tensors, None)
    # Two passes find the layers; then two of five batches.
    with pytest.raises(Interrupted, match="after 2 of 5 batches; the same command goes on"):
        measured(StopAfter(4), tensors, path)
    assert len(list(tmp_path.glob("*.partial"))) == 1
    resumed = StopAfter(5)
    result = measured(resumed, tensors, path)
    assert resumed.left == 0
    np.testing.assert_allclose(result.cka, whole.cka, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.cka_se, whole.cka_se, rtol=0, atol=1e-12)
    assert not list(tmp_path.iterdir())


def test_fresh_starts_over_and_other_facts_leave_the_state_alone(tensors, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Interrupted):
        measured(StopAfter(4), tensors, path)
    kept = next(tmp_path.glob("*.partial")).read_bytes()
    measured(StopAfter(99), tensors, path, seed=1)
    assert next(tmp_path.glob("*.partial")).read_bytes() == kept
    fresh = StopAfter(7)
    measured(fresh, tensors, path, fresh=True)
    assert fresh.left == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "torn", "other version"])
def test_a_damaged_state_is_done_again(tensors, tmp_path, damage):
    path = tmp_path / "state"
    with pytest.raises(Interrupted):
        measured(StopAfter(4), tensors, path)
    file = next(tmp_path.glob("*.partial"))
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "torn": content[: len(content) // 2]}.get(damage, content))
    if damage == "other version":
        with np.load(file) as old:
            arrays = {name: old[name] for name in old.files}
        arrays["_key"] = np.array("another")
        with file.open("wb") as out:
            np.savez(out, **arrays)
    again = StopAfter(7)
    result = measured(again, tensors, path)
    assert again.left == 0
    np.testing.assert_array_equal(result.cka, measured(StopAfter(9), tensors, None).cka)


def test_no_batch_counts_twice_when_partial_files_overlap(tmp_path):
    def state(value):
        return {"total": torch.full((2,), float(value), dtype=torch.float64)}

    def checkpoint(rank, world=2):
        return Checkpoint(tmp_path / "s", {"a": 1}, 4, rank, world)

    checkpoint(0).save(state(7), np.array([True, True, True, False]))
    checkpoint(1).save(state(5), np.array([False, False, True, False]))
    checkpoint(2).save(state(1), np.array([False, False, False, True]))
    total = state(0)
    done = checkpoint(0, world=1).load(total)
    assert done.all() and total["total"].tolist() == [8, 8]


def test_gpu_memory_that_runs_out_says_which_batch_size_to_try(tensors):
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.passes = nn.Conv2d(3, 3, 1), 0

        def forward(self, x):
            self.passes += 1
            if self.passes > 2:
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
from pathlib import Path
r = cka.measure(wrap(Slow()), images, batch_size=4, layers="net.*", save_every=0.0,
                checkpoint=Path(sys.argv[1]) / "state")
import os
if int(os.environ.get("RANK", 0)) == 0:
    r.save(Path(sys.argv[1]) / "result")
"""


def test_killed_at_any_moment_and_resumed_the_numbers_are_the_same(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    kills = 0
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, str(script), str(out), "0.05"])
        deadline = time.monotonic() + 60
        # Let it get a different way each time, then kill it without warning.
        while process.poll() is None and time.monotonic() < deadline:
            if list(out.glob("*.partial")) and attempt < 3:
                time.sleep(0.11 * (attempt + 1))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills == 3 and process.returncode == 0
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, str(script), str(whole), "0"], check=True)
    with np.load(out / "result.npz") as a, np.load(whole / "result.npz") as b:
        np.testing.assert_allclose(a["cka"], b["cka"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(a["cka_se"], b["cka_se"], rtol=0, atol=1e-9)
    assert not list(out.glob("*.partial"))


def test_two_processes_agree_with_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={count}", str(script), str(tmp_path / str(count)), "0"],
            check=True, env=environment, capture_output=True,
        )  # fmt: skip
    with np.load(tmp_path / "1" / "result.npz") as a, np.load(tmp_path / "2" / "result.npz") as b:
        np.testing.assert_allclose(a["cka"], b["cka"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(a["cka_se"], b["cka_se"], rtol=0, atol=1e-9)
    assert not list((tmp_path / "2").glob("*.partial"))
