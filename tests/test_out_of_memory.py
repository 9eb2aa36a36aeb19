"""Memory that runs out anywhere is one line that says so; nothing that was measured is lost."""

import errno

import numpy as np
import pytest
import torch
from torch import nn

from vitprobe import VitprobeError, attention_distance, cka, linear_probe, report, wrap
from vitprobe.errors import ran_out
from vitprobe.models import contents, loading
from vitprobe.results import result as results
from vitprobe.running.checkpoint import Checkpoint
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_each

WORDS = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"
OUT = [
    MemoryError(),
    torch.OutOfMemoryError("HIP: tried to allocate 2 GiB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("Caught OSError in DataLoader worker process 0.\n[Errno 12] Cannot allocate memory"),
    RuntimeError(WORDS),
    RuntimeError("could not create a primitive"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ImportError("libgomp.so.1: failed to map segment from shared object"),
    RuntimeError("Caught _ArrayMemoryError: Unable to allocate 7.45 GiB for an array"),
]
OTHERS = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    OSError(errno.ENOSPC, "No space left on device"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.png"),
    ValueError("out of memory"),
    ImportError("x.so: failed to map segment from shared object: Operation not permitted"),
    VitprobeError("No such file: 'out of memory.png'"),
]


def short(*_, **__):
    raise RuntimeError(WORDS)


def arguments(tmp_path, *more):
    return ["--models", "test_vit@random", "--image-size", "32", "--batch-size", "4",
            "--num-images", "16", "--workers", "0", "--device", "cpu", "--stem", "x",
            "--out", str(tmp_path / "out"), *more]  # fmt: skip


def test_every_library_has_words_of_its_own_for_it():
    assert [ran_out(error) for error in OUT] == [True] * len(OUT)
    assert [ran_out(error) for error in OTHERS] == [False] * len(OTHERS)


@pytest.mark.parametrize("at", [1, 3, 6, 10])
def test_a_pass_that_runs_out_of_memory_is_no_fault_of_the_model(at, tensors):
    """In whichever pass: of the example, while layers are found, in the first batch or later."""

    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.passes = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 0

        def forward(self, x):
            self.passes += 1
            if self.passes >= at:
                raise RuntimeError("could not create a primitive")
            return self.net(x)

    with pytest.raises(
        VitprobeError, match=r"^Out of memory on cpu at --batch-size 4; try --ba.* 2"
    ):
        cka.measure(wrap(Short(), "net"), tensors, layers="net.*", batch_size=4, device="cpu")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["image", "transform"])
def test_an_image_is_not_broken_because_memory_is_short(where, workers, pictures):
    def to_tensor(image):
        if where == "transform" and np.asarray(image)[0, 0, 0] == odd:
            raise MemoryError
        return torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()

    from vitprobe import open_images
    from vitprobe.images.sources import Images

    opened = open_images(pictures)
    odd, read = np.asarray(opened.open(7))[0, 0, 0], Images.open
    assert [np.asarray(opened.open(i))[0, 0, 0] == odd for i in range(12)].count(True) == 1

    def opens(self, position):
        if where == "image" and position == 7:
            raise MemoryError
        return read(self, position)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    name = opened.name(7).replace(".", r"\.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Images, "open", opens)
        with pytest.raises(VitprobeError, match=rf"^Out of memory while {name} was read \(Memory"):
            cka.measure(wrap(net, "net", transform=to_tensor), pictures, batch_size=4,
                        layers="all", workers=workers, device="cpu")  # fmt: skip


def test_a_state_is_not_given_up_because_memory_is_short(tmp_path, monkeypatch):
    state = {"total": torch.ones(2, dtype=torch.float64)}
    kept = Checkpoint(tmp_path / "s", {"a": 1}, 3, 0)
    kept.save(state, np.array([True, True, False]))
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", short)
        with pytest.raises(RuntimeError, match="allocate"):
            kept.load(state)
    assert kept.load(state).tolist() == [True, True, False]


def test_files_are_not_called_damaged_because_memory_is_short(tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file(wrap_of("test_vit@random").state_dict(), weights)
    asked = arguments(tmp_path, "--models", f"test_vit@{weights}", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(contents, "load", short)
        patch.setattr("safetensors.torch.load_file", short)
        assert cka.main(asked) == 2
    told = capsys.readouterr().err
    assert told.startswith("vitprobe: Out of memory on cpu at --batch-size 4") and one_line(told)
    assert cka.main(asked) == 0
    from vitprobe import redraw
    from vitprobe.results import reading

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(reading.np, "load", short)
        assert redraw.main([str(tmp_path / "out" / "x.npz")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("vitprobe: Out of memory") and one_line(told)


def wrap_of(spec):
    return loading.load_model(spec).module


def one_line(told):
    return told.count("\n") == 1 and told.endswith("\n")


@pytest.mark.parametrize("where", ["result", "drawing"])
def test_what_is_measured_is_kept_where_the_end_runs_out(where, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        if where == "result":
            patch.setattr(cka._Watch, "result", short)
        else:
            patch.setattr(cka.CKAResult, "plot", short)
        assert cka.main(arguments(tmp_path)) == 2
    told = capsys.readouterr().err
    assert told.startswith("vitprobe: Out of memory") and one_line(told)
    assert told.endswith("Run the same command to resume.\n")
    assert cka.main(arguments(tmp_path)) == 0
    assert "Resuming after batch 4 of 4" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["x.npz", "x.png"]


def test_the_fit_of_probes_that_runs_out_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.linalg, "eigh", short)
    monkeypatch.setattr(torch.linalg, "cholesky", short)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", short)
    asked = arguments(tmp_path, "--num-images", "40", "--shots", "2")
    assert linear_probe.main(asked) == 2
    told = capsys.readouterr().err
    assert told.startswith("vitprobe: Out of memory on cpu") and one_line(told)


def test_a_report_keeps_all_others(tmp_path, monkeypatch, capsys):
    asked = arguments(tmp_path, "--only", "cka", "attention_distance",
                      "position_embedding")  # fmt: skip
    from vitprobe import position_embedding

    with monkeypatch.context() as patch:
        patch.setattr(position_embedding.MEASUREMENT, "of", short)
        patch.setattr(attention_distance._Watch, "result", short)
        assert report.main(asked) == 2
    told = capsys.readouterr()
    assert "2 of 3 measurements failed" in told.err and "Out of memory" in told.err
    assert one_line(told.err)
    assert [file.name for file in (tmp_path / "out").glob("*.npz")] == ["x-cka.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(results.Result, "npz", short)
        assert report.main(asked) == 2
    told = capsys.readouterr().err
    assert told.startswith("vitprobe: Out of memory") and one_line(told)
    assert report.main(asked) == 0
    assert len(list((tmp_path / "out").glob("*.npz"))) == 3


def test_measurements_go_on_where_one_of_the_weights_runs_out(tensors, monkeypatch):
    from vitprobe import patch_embedding

    monkeypatch.setattr(patch_embedding.MEASUREMENT, "of", short)
    found = measure_each(
        {"cka": cka.MEASUREMENT(), "patch_embedding": patch_embedding.MEASUREMENT()},
        "test_vit@random", tensors, Options(batch_size=4, device="cpu"), go_on=True,
    )  # fmt: skip
    assert list(found) == ["cka"]
    assert found.failed["patch_embedding"].startswith("Out of memory on cpu at --batch-size 4")
