"""Bad days: full disks, vanished folders, damaged and odd files, signals; what the user sees."""

import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data._utils import signal_handling

from vitprobe import VitprobeError, attention_distance, cka, open_images, wrap
from vitprobe.images import decoding as pictures
from vitprobe.results.writing import write_atomically
from vitprobe.running import memory
from vitprobe.running.checkpoint import Checkpoint, UntilWritten
from vitprobe.running.interrupts import Interrupted
from vitprobe.running.loop import run
from vitprobe.running.options import Options
from vitprobe.running.session import session
from vitprobe.tracing.capture import capture


def noise(height, width, seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


def to_tensor(image):
    return torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Files and pictures


def test_pictures_of_every_kind_and_name_are_read(tmp_path):
    folder = tmp_path / "odd ä 图 $x$ $\\y"
    folder.mkdir()
    noise(1, 1).save(folder / "one pixel.png")
    noise(30, 30).convert("CMYK").save(folder / "cmyk.jpg")
    noise(30, 30).convert("P").save(folder / "palette.gif")
    noise(30, 30).save(folder / "moving.gif", save_all=True, append_images=[noise(30, 30, 1)])
    deep = np.random.default_rng(0).integers(0, 65536, (30, 30), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "sixteen bits.tiff")
    turned = noise(20, 40)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "日本 語.jpg", exif=exif)
    with open(os.fsencode(folder) + b"/no text \xff.png", "wb") as file:
        noise(30, 30).save(file, format="PNG")
    images = open_images(folder)
    assert len(images) == 7
    for i in range(7):
        assert images.open(i).mode == "RGB"
    result = cka.measure("test_vit@random", folder, image_size=32, workers=0)
    assert result.meta["n"] == 7
    with warnings.catch_warnings():
        # The font has no such signs; that is matplotlib's to say.
        warnings.simplefilter("ignore", UserWarning)
        assert len(result.save(tmp_path / "ä 图")) == 2


def test_decoding_is_bounded(tmp_path):
    for size in ((20_000, 20_000), (1, 20_000)):
        # The header says so: nothing is decoded to find out.
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        content = chunk(b"IHDR", header) + chunk(b"IDAT", b"")
        (tmp_path / "big.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="pixels are"):
                pictures.decoded(tmp_path / "big.png")
    # Pictures that a program draws are not drawn, whatever their name.
    (tmp_path / "drawn.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )
    with pytest.raises(Image.UnidentifiedImageError):
        pictures.decoded(tmp_path / "drawn.png")


def chunk(kind, content):
    import zlib

    sum_ = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + sum_


def test_no_pickle_is_executed(pictures, tmp_path, capsys):
    trace = tmp_path / "executed"
    content = pickle.dumps(Evil(trace))
    for name in ("weights.pth", "weights.safetensors", "images.npy", "images.npz"):
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "objects.npz", images=np.array([Evil(trace)], dtype=object))
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(pictures, "p")
    (tmp_path / "_p_tarinfos.pickle").write_bytes(content)
    out = tmp_path / "out"
    arguments = ["--models", "test_vit@random", "--image-size", "32", "--out", str(out)]
    for changes, status in [
        (["--models", f"test_vit@{tmp_path}/weights.pth"], 2),
        (["--models", f"test_vit@{tmp_path}/weights.safetensors"], 2),
        (["--images", str(tmp_path / "images.npy")], 2),
        (["--images", str(tmp_path / "images.npz")], 2),
        (["--images", str(tmp_path / "objects.npz")], 2),
        (["--images", str(tmp_path / "p.tar")], 0),
    ]:
        assert cka.main([*arguments, *changes]) == status
    capsys.readouterr()
    assert not trace.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_truncated_checkpoint_is_one_line(name, tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    state = timm.create_model("test_vit").state_dict()
    path = tmp_path / name
    (torch.save if name.endswith("pth") else save_file)(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert cka.main(["--models", f"test_vit@{path}", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "weights" in told and told.count("\n") == 1


# Images that go away


def test_images_that_vanish_stop_the_run_and_do_not_count_as_broken(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(200):
        noise(16, 16, i).save(folder / f"{i}.png")
    away, first = tmp_path / "unmounted", [True]

    class Unmounts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.passes = small(), 0

        def forward(self, x):
            self.passes += 1
            if self.passes == 6 and first:
                first.clear()
                folder.rename(away)
            return self.net(x)

    def measured():
        model = wrap(Unmounts(), name="net", transform=to_tensor)
        return cka.measure(
            model, folder, batch_size=8, layers="net.*", workers=0, checkpoint=tmp_path / "state"
        )

    with pytest.raises(VitprobeError, match=r"png of pictures can no longer be reached: No such"):
        measured()
    away.rename(folder)
    result = measured()
    assert result.meta["images"]["broken"] == [] and result.meta["n"] == 200
    assert not list(tmp_path.glob("*.partial"))


def test_a_batch_of_broken_images_only_is_passed_over(pictures):
    for i in range(100):
        noise(16, 16, i).save(pictures / f"{i}.png")
    (pictures / "7.png").write_bytes(b"torn")
    result = attention_distance.measure(
        "test_vit@random", pictures, image_size=32, batch_size=1, workers=0
    )
    assert result.meta["images"]["broken"] == ["7.png"] and result.meta["n"] == 111


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_a_link_to_nowhere_is_a_broken_image(pictures):
    for i in range(100):
        noise(16, 16, i).save(pictures / f"{i}.png")
    (pictures / "link.png").symlink_to(pictures / "nowhere")
    result = cka.measure("test_vit@random", pictures, image_size=32, workers=0)
    assert result.meta["images"]["broken"] == ["link.png"]


def test_a_tar_is_read_rightly_by_several_processes(tmp_path):
    """An open tar shared by processes would give pictures from the wrong places."""
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for i in range(64):
            noise(40, 40, i).save(tmp_path / "x.png")
            tar.add(tmp_path / "x.png", f"{i}.png")
    for workers in (0, 4):
        model = wrap(small(), name="net", transform=to_tensor)
        result = cka.measure(
            model, tmp_path / "p.tar", batch_size=4, layers=["0", "2"], workers=workers
        )
        if workers == 0:
            alone = result
    assert result.meta["images"]["broken"] == []
    np.testing.assert_array_equal(result.cka, alone.cka)


# Disks


def test_a_disk_that_fills_up_in_mid_run_costs_the_state_not_the_run(
    tensors, tmp_path, monkeypatch, capsys
):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = UntilWritten(tmp_path / "state")
    result = cka.measure(
        small(), tensors, batch_size=4, layers="all", save_every=0, checkpoint=path
    )
    told = capsys.readouterr().err
    assert told.count("cannot be saved") == 1 and "No space left on device" in told
    assert np.isfinite(result.cka).all()
    # The first save is as it was, and nothing is beside it.
    assert [file.suffix for file in tmp_path.iterdir()] == [".partial"]


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from vitprobe.results.writing import *\n"
        "write_atomically({Path(sys.argv[1]): lambda file: os.kill(os.getpid(), 9)})"
    )
    path = tmp_path / "result.npz"
    subprocess.run([sys.executable, "-c", code, str(path)])
    assert len(list(tmp_path.iterdir())) == 1
    write_atomically({path: b"whole"})
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"whole"


def test_a_save_cut_off_leaves_nothing_after_the_run(tmp_path):
    # By another process of the run, and there is no later save in whose way it would be.
    code = (
        "import os, sys; from pathlib import Path; from vitprobe.running import checkpoint\n"
        "checkpoint.np.savez = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        "place = Path(sys.argv[1]) / '.x'\n"
        "checkpoint.Checkpoint(place, {'a': 1}, 3, 2).save({}, checkpoint.np.ones(3, bool))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 1
    Checkpoint(tmp_path / ".x", {"a": 2}, 3, 0).remove()
    assert len(list(tmp_path.iterdir())) == 1
    Checkpoint(tmp_path / ".x", {"a": 1}, 3, 0).remove()
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_command_at_once_count_nothing_twice(tensors, tmp_path):
    """The second begins in the middle of the first, whose state it takes, and ends before it."""
    options = {"batch_size": 4, "layers": ["0", "2"], "save_every": 0.0}
    alone = cka.measure(wrap(small(), "net"), tensors, **options)
    found = []

    class Meanwhile(nn.Sequential):
        passes = 0

        def forward(self, x):
            self.passes += 1
            if self.passes == 6:
                second = wrap(small(), "net")
                found.append(cka.measure(second, tensors, checkpoint=tmp_path / "s", **options))
            return super().forward(x)

    first = wrap(Meanwhile(*small()), "net")
    found.append(cka.measure(first, tensors, checkpoint=tmp_path / "s", **options))
    for result in found:
        np.testing.assert_allclose(result.cka, alone.cka, rtol=0, atol=1e-12)
        assert result.meta["n"] == 20


# Memory, processes


def test_the_forecast_counts_what_is_alive_at_the_fullest_moment():
    net, inputs = small().eval(), torch.randn(2, 3, 32, 32)
    unit = 2 * 8 * 32 * 32 * 4
    with torch.inference_mode():
        most = memory.fullest(lambda: net(inputs), [*net.parameters(), inputs])
    # The first convolution's output beside its ReLU's.
    assert most == 2 * unit
    with torch.inference_mode():
        forecast = memory.forecast([net], [inputs], batch_size=64, waiting=1, own=1000)
    # The example is of 2 images; a batch of 64 is in use and another one waits.
    assert forecast.activations == 32 * (2 * unit + 2 * memory.nbytes([inputs]))
    assert forecast.parameters == memory.nbytes(net.parameters())
    deep, inputs = nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(5)]), torch.ones(2, 8, 32, 32)
    for gradients, alive in ((False, 2), (True, 5)):
        with torch.set_grad_enabled(gradients):
            found = memory.forecast([deep], [inputs], batch_size=2, waiting=0, own=0)
        assert found.activations == alive * unit + memory.nbytes([inputs])


def test_a_run_that_will_not_fit_warns_with_the_batch_size_to_try(tensors, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**19)
    cka.measure(small(), tensors, batch_size=20, layers="all")
    told = capsys.readouterr().err
    assert "may not fit: try --batch-size" in told
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**40)
    cka.measure(small(), tensors, batch_size=20, layers="all")
    assert capsys.readouterr().err == ""


def test_memory_is_flat_over_a_hundred_batches():
    """The tensors alive after the tenth batch are as many as after the hundred and tenth."""
    import gc

    images = torch.randn(440, 3, 8, 8)
    with session(small(), images, Options(batch_size=4)) as ready:
        sums, alive = ready.sums(total=()), []
        from vitprobe.tracing.layers import map_layers

        layers = map_layers("net", ready.models[0].module, ready.example()[0]).choose("all")

        def step(batch):
            def reduce(i, tensor):
                sums["total"] += tensor.sum()

            with capture(ready.models[0].module, layers, reduce):
                ready.models[0].module(batch.inputs[0])
            if batch.index in (9, 109):
                gc.collect()
                alive.append(sum(torch.is_tensor(one) for one in gc.get_objects()))

        run(ready, step, sums, decides={})
    assert alive[0] == alive[1]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_decoding_process_that_the_system_ends_is_one_line(tmp_path):
    # So many that the process cannot have them all ready before it is ended.
    pictures = np.zeros((80, 48, 48, 3), dtype=np.uint8)

    class Kills(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.passes = small(), 0

        def forward(self, x):
            import multiprocessing

            self.passes += 1
            # Once there is something to go on from.
            if self.passes > 5:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            return self.net(x)

    model = wrap(Kills(), name="net", transform=to_tensor)
    with pytest.raises(
        VitprobeError, match=r"ended a process that decodes .* run the same command to resume"
    ):
        cka.measure(model, pictures, batch_size=4, layers="net.*", workers=1, save_every=0.0,
                    checkpoint=tmp_path / "s")  # fmt: skip
    # torch tells of each ended process once, be it in the middle of the next test.
    for _ in range(20):
        try:
            signal_handling._error_if_any_worker_fails()
        except RuntimeError:
            break
        time.sleep(0.05)


def test_ctrl_c_while_the_result_is_drawn_loses_nothing(pictures, tmp_path, monkeypatch, capsys):
    arguments = ["--models", "test_vit@random", "--images", str(pictures), "--image-size", "32",
                 "--out", str(tmp_path / "out"), "--stem", "x"]  # fmt: skip

    def interrupted(self, ax=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cka.CKAResult, "plot", interrupted)
        assert cka.main(arguments) == 130
    assert "Run the same command to resume" in capsys.readouterr().err
    assert cka.main(arguments) == 0
    assert "Resuming after batch 1 of 1" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["x.npz", "x.png"]


def test_weights_that_are_not_finite_name_the_first_layer(tensors):
    net = small()
    with torch.no_grad():
        net[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(VitprobeError, match="layer 2 of net is not finite; it is the first"):
        cka.measure(wrap(net, "net"), tensors, layers="all")
    with pytest.raises(Interrupted), session(net, tensors, Options()) as ready:
        run(ready, lambda batch: signal.raise_signal(signal.SIGINT), ready.sums(a=()), decides={})


@pytest.mark.parametrize("words", ["could not create a primitive", "CUDA out of memory. Tried"])
def test_memory_that_runs_out_while_models_are_set_up_is_the_same_line(words, tensors, monkeypatch):
    def short(*_, **__):
        raise RuntimeError(words)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", short)
        with pytest.raises(
            VitprobeError, match=r"Out of memory on cpu at .* try --batch-size 16 \(mo.*: Seq"
        ):
            cka.measure(small(), tensors, device="cpu")
    from vitprobe.running import session as sessions

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "load_models", short)
        with (
            pytest.raises(VitprobeError, match="Out of memory on cpu"),
            session("test_vit@random", tensors, Options(device="cpu")),
        ):
            pass


def test_an_output_folder_that_becomes_a_file_in_mid_run_is_told_as_that(tmp_path):
    (tmp_path / "out").write_text("")
    for path in (tmp_path / "out" / "x.npz", tmp_path / "out" / "deeper" / "x.npz"):
        with pytest.raises(VitprobeError, match=r"out is a file, not a folder"):
            write_atomically({path: b"result"})
