"""From images to batches: what transforms give, sizes that differ, processes that start anew."""

import multiprocessing
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitprobe import VitprobeError, cka, open_images, wrap
from vitprobe.running import loading
from vitprobe.running.sending import cannot_be_sent


def net(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def to_tensor(image):
    return torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()


class Bag(dict):
    """As processors' own mappings."""


def measured(images, transform, **options):
    options = {"layers": ["0", "2"], "workers": 0, "batch_size": 4} | options
    return cka.measure(wrap(net(), "net", transform), images, **options)


TRANSFORMS = {
    "array": lambda image: to_tensor(image).numpy(),
    "batch of one": lambda image: to_tensor(image)[None],
    "dict": lambda image: {"pixel_values": to_tensor(image)},
    "dict with a list of arrays": lambda image: Bag(pixel_values=[to_tensor(image).numpy()]),
    "dict with a batch": lambda image: {"pixel_values": to_tensor(image)[None]},
}


@pytest.mark.parametrize("what", TRANSFORMS)
def test_what_transforms_give_is_taken_as_the_tensor_in_it(what, pictures):
    plain = measured(pictures, to_tensor)
    np.testing.assert_array_equal(measured(pictures, TRANSFORMS[what]).cka, plain.cka)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image, "gave a PIL image for"),
        (lambda image: np.asarray(image).copy(), r"gave a tensor of \(48, 48, 3\), its channels"),
        (lambda image: to_tensor(image)[0], r"gave a tensor of \(48, 48\) for"),
        (lambda image: {"image": 1}, "gave a dict with image, without 'pixel_values'"),
        (lambda image: 1 // 0, "raised ZeroDivisionError: integer division or modulo by zero at"),
    ],
)
def test_what_a_transform_may_not_give_is_told_with_the_image(transform, message, pictures):
    with pytest.raises(VitprobeError, match=rf"The transform of net {message}.*\.png"):
        measured(pictures, transform)


def folder(tmp_path, sizes):
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [([(32, 32), (40, 32)] * 8, 4), ([(32, 32)] * 15 + [(40, 32)], 4), ([(32, 32), (40, 32)], 1)],
)
def test_images_of_different_sizes_are_one_line(sizes, batch_size, workers, tmp_path):
    with pytest.raises(VitprobeError) as caught:
        run = loading.TransformedImages([wrap(net(), "net", to_tensor)], opened(tmp_path, sizes))
        positions = np.array_split(np.arange(len(sizes)), len(sizes) // batch_size)
        for _ in loading.batches(run, positions, workers, pin=False):
            pass
    line = str(caught.value)
    assert line.startswith("The transform of net gives images of different sizes: ")
    for size, name in (("(3, 32, 32) for ", ".png"), ("(3, 32, 40) for ", ".png")):
        assert size in line and name in line.split(size)[1][:7]


def opened(tmp_path, sizes):
    return open_images(folder(tmp_path, sizes))


def late(image):
    if image.size[0] > 32:
        raise ValueError("no rule for panoramas")
    return to_tensor(image)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_transform_ends_the_run_and_is_no_broken_image(workers, tmp_path):
    folder(tmp_path, [(32, 32)] * 219 + [(40, 32)])
    with pytest.raises(VitprobeError, match=r"raised ValueError: no rule for panoramas at 219.png"):
        measured(tmp_path, late, workers=workers)


class Ends(BaseException):
    """As test libraries have them."""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("raised", "told"),
    [(SystemExit(3), "SystemExit: 3"), (SystemExit(), "SystemExit"), (Ends("now"), "Ends: now")],
)
def test_a_transform_that_would_end_the_run_is_told_as_its_error(workers, raised, told, pictures):
    def ends(image):
        if image.getpixel((0, 0)) == last:
            raise raised
        return to_tensor(image)

    last = Image.open(pictures / "cat" / "5.png").getpixel((0, 0))
    with pytest.raises(VitprobeError, match=rf"transform of net raised {told} at cat/5\.png\.$"):
        measured(pictures, ends, workers=workers)


class ExitsOnce(torch.utils.data.Dataset):
    """sys.exit() in a user's own data set: an image that cannot be read, as with other errors."""

    def __len__(self):
        return 120

    def __getitem__(self, index):
        if index == 77:
            sys.exit("no such row")
        return Image.new("RGB", (32, 32), (index, 3 * index % 256, 7 * index % 256))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_would_end_the_run_has_an_image_that_cannot_be_read(workers, capsys):
    result = measured(ExitsOnce(), to_tensor, workers=workers)
    assert result.meta["images"]["broken"] == ["image 77"]
    assert "Skipped image 77: SystemExit: no such row" in capsys.readouterr().err


def test_first_items_that_would_end_the_run_are_one_line(tmp_path):
    class Exits(ExitsOnce):
        def __getitem__(self, index):
            sys.exit(4)

    for source in (Exits(), torch.utils.data.DataLoader(Exits(), batch_size=4)):
        with pytest.raises(VitprobeError, match="SystemExit: 4"):
            open_images(source)


@pytest.mark.skipif(loading.anew(), reason="only processes that are forked see the test's function")
def test_a_decoding_process_that_ends_by_itself_is_told_with_its_status(tmp_path):
    folder(tmp_path, [(32, 32)] * 39 + [(40, 32)])

    def ends(image):
        if multiprocessing.parent_process() is not None and image.size[0] > 32:
            os._exit(7)
        return to_tensor(image)

    with pytest.raises(VitprobeError, match="ended by itself, with status 7"):
        measured(tmp_path, ends, workers=1)


def test_images_in_lists_of_tensors_of_different_sizes():
    tensors = [torch.randn(3, 16, 16) for _ in range(7)] + [torch.randn(3, 16, 24)]
    with pytest.raises(VitprobeError, match=r"The images of a list are of different sizes"):
        measured(tensors, None)


# One channel


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_networks_of_one_channel_see_luminance(name, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
    colour = np.repeat(grey[..., None], 3, -1)
    for kind, array in (("L", grey), ("RGB", colour)):
        (tmp_path / kind).mkdir()
        for i, pixels in enumerate(array):
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    options = {} if name == "test_resnet" else {"img_size": 64}
    torch.manual_seed(0)
    model = wrap(timm.create_model(name, in_chans=1, **options))
    assert model.input_size[0] == 1
    made = model.transform(Image.fromarray(grey[0]))
    assert tuple(made.shape) == model.input_size
    # The very transform of three channels, whose means are averaged.
    three = wrap(timm.create_model(name, **options)).transform(Image.fromarray(colour[0]))
    spread = three.mean(0, keepdim=True)
    assert torch.corrcoef(torch.stack([made.flatten(), spread.flatten()]))[0, 1] > 0.999
    sources = (grey, grey[..., None], colour, tmp_path / "L", tmp_path / "RGB")
    found = [cka.measure(model, one, workers=0, layers="blocks").cka for one in sources]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_networks_of_other_channels_need_a_transform(pictures):
    model = timm.create_model("test_resnet", in_chans=2)
    with pytest.raises(VitprobeError, match=r"has no transform: pass wrap\(module, transform"):
        cka.measure(model, pictures)


# Processes that start anew, as on macOS and Windows


SCRIPT = """
import multiprocessing, sys, torch
from torch import nn
from vitprobe import cka, wrap
import numpy as np

def to_tensor(image):
    return torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()

def made(by):
    def inner(image):
        return by(image)
    return inner

class Own:
    def __call__(self, image):
        return to_tensor(image)

transforms = {"named": to_tensor, "made": made(to_tensor), "lambda": lambda image: to_tensor(image),
              "own": Own()}

def main():
    multiprocessing.set_start_method("spawn", force=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 4, 1))
    for name in sys.argv[2:]:
        result = cka.measure(wrap(net, "net", transforms[name]), sys.argv[1], layers=["0", "1"],
                             batch_size=4, workers=1)
        print(name, result.meta["n"], flush=True)
"""
GUARD = "\nif __name__ == '__main__':\n    main()\n"


def started_anew(code, pictures, tmp_path, names, by_stdin=False):
    file = tmp_path / "script.py"
    file.write_text(code)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-" if by_stdin else str(file), str(pictures), *names],
        input=code if by_stdin else None, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_what_is_defined_where_others_do_not_look_is_used_without_processes(pictures, tmp_path):
    """Under ``if __name__ == "__main__"`` it has a name, which means nothing elsewhere."""
    own = """
if __name__ == "__main__":
    def hidden(image):
        return to_tensor(image)
    transforms["hidden"] = hidden
    main()
"""
    done = started_anew(SCRIPT + own, pictures, tmp_path, ["hidden"])
    assert done.stdout == "hidden 12\n", done.stderr
    (told,) = done.stderr.splitlines()
    assert told.startswith("vitprobe: images are decoded in this process: hidden is defined under")


def test_transforms_that_cannot_be_sent_are_used_without_processes(pictures, tmp_path):
    names = ["named", "made", "lambda"]
    done = started_anew(SCRIPT + GUARD, pictures, tmp_path, names)
    assert done.stdout.splitlines() == [f"{name} 12" for name in names], done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 2 and all("images are decoded in this process: a transform cannot" in line
                                  for line in told)  # fmt: skip


SOURCES = """
import multiprocessing, sys, torch, torchvision
from torch import nn
from torchvision.transforms import v2
from vitprobe import cka, wrap

class Rows(torch.utils.data.Dataset):
    def __init__(self, root):
        self.files = torchvision.datasets.ImageFolder(root)
    def __len__(self):
        return len(self.files)
    def __getitem__(self, index):
        return {"image": self.files[index][0], "label": index % 2}

def main():
    root = sys.argv[1]
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    rows = Rows(root)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=list)
    unsent = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=lambda rows: rows)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    found = []
    for method, source, workers in [
        (None, root, 0), ("spawn", root, 2), (None, rows.files, 0), ("forkserver", rows.files, 1),
        ("spawn", rows, 1), ("spawn", loader, 1), ("spawn", unsent, 1),
    ]:
        if method in multiprocessing.get_all_start_methods():
            multiprocessing.set_start_method(method, force=True)
        result = cka.measure(wrap(net, "net", to_tensor), source, layers=["0", "2"],
                             batch_size=4, workers=workers)
        print(type(source).__name__, result.meta["n"], float(result.cka[0, 1]), flush=True)
"""


def test_sources_of_all_kinds_are_sent_to_processes_that_start_anew(pictures, tmp_path):
    done = started_anew(SOURCES + GUARD, pictures, tmp_path, [])
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in lines] == [
        "str", "str", "ImageFolder", "ImageFolder", "Rows", "DataLoader", "DataLoader"
    ], done.stderr  # fmt: skip
    assert {n for _, n, _ in lines} == {"12"}
    # torchvision sorts names in another way, and a loader has an order of its own.
    for same in (lines[:2], lines[2:5], lines[5:]):
        assert len({value for _, _, value in same}) == 1
    (told,) = done.stderr.splitlines()
    assert "images are decoded in this process: what gives them cannot be sent to others" in told


def test_what_a_session_without_a_file_defines_is_used_without_processes(pictures, tmp_path):
    done = started_anew(SCRIPT + GUARD, pictures, tmp_path, ["own"], by_stdin=True)
    assert done.stdout == "own 12\n", done.stderr
    assert "cannot read the script again, which has no file" in done.stderr


def test_what_a_notebook_defines_is_used_without_processes(pictures, monkeypatch):
    main = types.ModuleType("__main__")

    class Own:
        def __call__(self, image):
            return to_tensor(image)

    Own.__module__, Own.__qualname__ = "__main__", "Own"
    main.Own = Own
    monkeypatch.setitem(sys.modules, "__main__", main)
    for method, reason in (("fork", ""), ("spawn", "Own is defined in a session that others")):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda method=method: method)
        for transform, expected in ((Own(), reason), (to_tensor, "")):
            dataset = loading.TransformedImages(
                [wrap(net(), "net", transform)], open_images(pictures)
            )
            assert cannot_be_sent(dataset.images, dataset).startswith(expected)
            assert expected or not cannot_be_sent(dataset.images, dataset)


def test_a_script_without_a_guard_is_told_of_it(pictures, tmp_path):
    done = started_anew(SCRIPT + "\nmain()\n", pictures, tmp_path, ["named"])
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "a script needs if __name__ == '__main__'" in last and "workers=0" in last


def test_processes_that_decode_leave_telling_to_the_main_one(monkeypatch, capsys):
    """What ends because the main process does prints nothing; other errors still do."""
    told = []
    queue = multiprocessing.queues.Queue
    before = queue._on_queue_feeder_error
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "__excepthook__", lambda *what: told.append(what[0]))
    monkeypatch.setattr(
        queue, "_on_queue_feeder_error", lambda error, thing: told.append(type(error))
    )
    monkeypatch.setattr(loading.signal, "signal", lambda *_: None)
    loading._be_quiet(0)
    for error in (BrokenPipeError(), EOFError(), KeyboardInterrupt(), ValueError()):
        sys.excepthook(type(error), error, None)
        queue._on_queue_feeder_error(error, None)
    assert told == [KeyboardInterrupt, ValueError, ValueError]
    monkeypatch.undo()
    assert queue._on_queue_feeder_error is before


ENDED = "DataLoader worker (pid 1) is killed by signal: Killed. "


@pytest.mark.parametrize("error", [RuntimeError(ENDED), EOFError(), ConnectionResetError(104, "x")])
def test_an_ended_process_that_left_no_status_is_told(error, monkeypatch, tmp_path):
    """torch tells of it while a batch is fetched, or a connection breaks: no cause of itself."""

    class Breaks:
        def __init__(self, *args, **kwargs):
            self._workers = ()

        def __iter__(self):
            return self

        def __next__(self):
            raise error

    monkeypatch.setattr(loading, "DataLoader", Breaks)
    monkeypatch.setattr(loading, "anew", lambda: False)
    with pytest.raises(VitprobeError, match="ended a process that decodes images") as told:
        measured(np.zeros((8, 32, 32, 3), np.uint8), to_tensor, workers=1)
    assert told.value.__cause__ is error and error.__cause__ is None


def test_the_status_of_a_process_is_sought_in_causes_that_come_to_an_end():
    first, second = RuntimeError(ENDED), RuntimeError("DataLoader worker: exit code 7")
    first.__cause__ = first
    assert loading.decoder_status(first) is None
    first.__cause__, second.__cause__ = second, first
    assert loading.decoder_status(first) == 7
