"""Inputs that are odd rather than wrong: what can be measured is, the rest is one line."""

import io
import multiprocessing
import os
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from vitprobe import VitprobeError, cka, linear_probe, load_result, open_images, wrap
from vitprobe.errors import describe
from vitprobe.images.folders import shown_classes
from vitprobe.images.labelled import open_task
from vitprobe.results.writing import write_atomically


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def to_tensor(image):
    return torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()


def measured(images, transform=to_tensor, **options):
    options = {"layers": ["0", "2"], "workers": 0, "batch_size": 4} | options
    return cka.measure(wrap(net(), "net", transform), images, **options)


def pixels(n=12):
    return np.random.default_rng(0).integers(0, 255, (n, 16, 16, 3)).astype(np.uint8)


class Given:
    """A data set of somebody else's."""

    def __init__(self, item=None, length=lambda: 12, targets=None):
        self.item, self.length, self.targets = item, length, targets

    def __len__(self):
        return self.length()

    def __getitem__(self, index):
        return pixels()[index % 12] if self.item is None else self.item


# Arrays in files


def test_objects_beside_images_are_nobodys_business(tmp_path):
    x, path = pixels(), tmp_path / "x.npz"
    odd = np.array([{"taken": 2019}, None], dtype=object)
    np.savez(path, images=x, notes=odd, labels=np.arange(12) % 2)
    images = open_images(path)
    assert len(images) == 12 and images.classes == ("0", "1")
    np.savez(path, images=x, labels=odd)
    assert len(open_images(path)) == 12
    with pytest.raises(VitprobeError, match=r"labels of .* not Python objects"):
        open_task(path, None, 1, 1, None, 0)


def test_a_file_whose_labels_have_another_name_says_what_it_has(tmp_path):
    np.savez(tmp_path / "x.npz", images=pixels(), lebels=np.arange(12) % 2)
    with pytest.raises(VitprobeError, match=r"none of labels, .* which has lebels int64\[12\]"):
        open_task(tmp_path / "x.npz", None, 1, 1, None, 0)


@pytest.mark.parametrize("shape", [(16, 16, 3), (16, 16, 4), (16, 16, 1)])
def test_one_image_is_not_taken_for_many_narrow_ones(shape, tmp_path):
    array = np.zeros(shape, np.uint8)
    np.save(tmp_path / "x.npy", array)
    for source in (array, tmp_path / "x.npy"):
        with pytest.raises(VitprobeError, match="looks like one image"):
            open_images(source)


def test_masked_images_are_refused():
    x = np.ma.array(pixels())
    assert len(open_images(x)) == 12  # nothing is masked
    x.mask = pixels() > 200
    with pytest.raises(VitprobeError, match="are masked"):
        open_images(x)


def test_an_empty_text_is_no_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels()[0]).save(tmp_path / "x.png")
    assert cka.main(["--models", "resnet_box", "--images", ""]) == 2
    assert "--images: expected a path" in capsys.readouterr().err
    assert len(open_images(".")) == 1


# Names of classes


def test_no_two_names_of_classes_are_shown_alike():
    names = ["a\x1b", "a\\x1b", "a\\\\x1b", "\\\x1b", "\\\\x1b", "b\udcff", "b\\udcff", "b\\xff",
             "a\nb", "a\\nb", "\u202ec", "\\u202ec", "plain", "\\alpha", "$x$"]  # fmt: skip
    shown = shown_classes(names)
    assert len(set(shown)) == len(names)
    assert shown[-3:] == ("plain", "\\alpha", "$x$")
    assert all(one.isprintable() for one in shown)


def test_labels_of_bytes_and_their_escapes_are_classes_apart():
    labels = np.array([b"\xff", b"\\udcff", b"a"] * 4)
    images = open_images(Given(targets=labels))
    assert len(set(images.classes)) == 3
    assert len(set(images.labels.tolist())) == 3


@pytest.mark.skipif(os.name != "posix", reason="such names are refused there")
def test_classes_that_only_look_alike_are_not_mixed_up_between_fitting_and_test(tmp_path):
    names = ["a\x1b", "a\\x1b"]
    for split, order in (("fit", names), ("test", names[::-1])):
        for name in order:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixel = np.full((8, 8, 3), 10 * i + (split == "test"), np.uint8)
                Image.fromarray(pixel).save(tmp_path / split / name / f"{i}.png")
    task = open_task(tmp_path / "fit", tmp_path / "test", 2, 1, None, 0)
    fitting = open_images(tmp_path / "fit")
    of_name = {name.split("/")[0]: int(label) for name, label in zip(fitting.names, fitting.labels)}
    for i, label in enumerate(task.test.chosen_labels()):
        folder = task.test.names[task.test.order[i]].split("/")[0]
        assert task.classes[label] == fitting.classes[of_name[folder]]


# Labels in columns of data frames


def test_columns_go_by_position_or_are_asked_about():
    pandas = pytest.importorskip("pandas")
    y = np.arange(12) % 3
    features = np.eye(3)[y] + np.random.default_rng(0).normal(size=(12, 3)) / 100

    def accuracy(labels):
        found = linear_probe.from_features({"m": features}, labels=labels, shots=2, draws=1)
        return np.nanmax(found.accuracy)

    shuffled = np.random.default_rng(1).permutation(12)
    for column in (pandas.Series(y), pandas.Series(y, index=np.arange(12) + 5)):
        assert accuracy(column) == 1
    both = pandas.Series(y).iloc[shuffled]
    with pytest.raises(VitprobeError, match=r"another order than they are in: give labels\.to_num"):
        accuracy(both)
    assert accuracy(both.sort_index()) == 1


def test_a_part_of_a_data_set_has_the_labels_at_its_indices():
    pandas = pytest.importorskip("pandas")
    y = np.array(list("abcabcabcabc"))
    targets = pandas.Series(y, index=np.arange(100, 112))
    images = open_images(Subset(Given(targets=targets), [5, 4, 3]))
    assert [images.classes[label] for label in images.labels] == ["c", "b", "a"]
    mixed = pandas.Series(y, index=np.arange(12)[::-1])
    images = open_images(Subset(Given(targets=mixed), [5, 4, 3]))
    assert images.labels is None and "sort_index" in images.no_labels


# Data sets and transforms


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (lambda: 1 // 0, "ZeroDivisionError"),
        (lambda: 2**70, "OverflowError"),
        (lambda: sys.exit(3), "SystemExit: 3"),
    ],
)
def test_a_length_that_raises_is_one_line(length, message):
    with pytest.raises(VitprobeError, match=f"How many images a Given holds.*{message}"):
        open_images(Given(length=length))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3, 8, 8).to_sparse(), r"a sparse tensor of \(3, 8, 8\)"),
        (torch.zeros(3, 8, 8, device="meta"), r"a tensor of \(3, 8, 8\) without values"),
        (np.zeros((0, 8, 3), np.uint8), "8 × 0 pixels are no image"),
        (Image.new("RGB", (2, 500)), "2 × 500 pixels are longer"),
    ],
)
def test_items_without_pixels_of_their_own_are_no_images(item, message):
    with pytest.raises(VitprobeError, match=f"first item of a Given is not an image: {message}"):
        open_images(Given(item))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: to_tensor(image).to_sparse(), "gave a sparse tensor"),
        (lambda image: to_tensor(image).to("meta"), "without values"),
        (lambda image: to_tensor(image) * 1j, "gave a tensor of torch.complex64"),
        (lambda image: np.array(["a"]), r"gave an array of <U1 \(1,\)"),
        (lambda image: np.array([image], dtype=object), "gave an array of object"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_told_with_the_image(transform, message):
    with pytest.raises(VitprobeError, match=f"The transform of net .*{message}.* image"):
        measured(pixels(), transform)


def test_arrays_of_the_other_byte_order_are_the_same_numbers():
    swapped = measured(pixels(), lambda image: to_tensor(image).numpy().astype(">f4"))
    np.testing.assert_array_equal(swapped.cka, measured(pixels()).cka)


class Silent(Exception):
    def __str__(self):
        raise ValueError("no words")


def raises(error):
    """A transform that raises where the loop runs, not at the first look."""
    seen = []

    def transform(image):
        seen.append(1)
        if len(seen) > 8:
            raise error
        return to_tensor(image)

    return transform


def in_processes(error):
    def transform(image):
        if torch.utils.data.get_worker_info() is not None:
            raise error
        return to_tensor(image)

    return transform


def test_whatever_a_transform_raises_is_told_as_that():
    assert describe(Silent()) == "Silent: (its message raises ValueError)"
    for error in (Silent(), GeneratorExit("x")):
        with pytest.raises(VitprobeError, match=f"transform of net raised {type(error).__name__}"):
            measured(pixels(), raises(error))


@pytest.mark.parametrize("error", [KeyboardInterrupt("k"), GeneratorExit("g"), Silent()])
def test_what_it_raises_in_a_process_that_decodes_is_told_as_well(error):
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("it cannot be sent to processes that start anew")
    with pytest.raises(VitprobeError, match=f"transform of net raised {type(error).__name__}"):
        measured(pixels(), in_processes(error), workers=1)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and numbers of files are Linux's")
def test_too_many_open_files_are_one_line(pictures):
    """Before the first process is there, and in the midst of what processes send."""
    script = """
        import multiprocessing, os, resource, sys, torch, vitprobe
        from torch import nn
        from vitprobe import cka
        torch.set_num_threads(1)
        multiprocessing.set_start_method("fork")
        class Blank:
            def __call__(self, image): return torch.ones(3, 16, 16)
        models = [vitprobe.wrap(nn.Conv2d(3, 8, 8, 8), f"m{i}", Blank()) for i in range(12)]
        images = vitprobe.open_images(sys.argv[1])
        images.open(0)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for spare in (2, 30):
            limit = len(os.listdir("/proc/self/fd")) + spare
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
            try:
                cka.measure(models, images, layers="all", batch_size=4, workers=2, quiet=True)
            except vitprobe.VitprobeError as error:
                print("LINE", error)
    """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(pictures)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.stdout.count("LINE Too many files are open at once") == 2, ran.stdout + ran.stderr
    assert ran.stdout.count("\n") == 2 and not ran.stderr


# Files that are read and written


def test_a_result_that_unfolds_to_far_more_than_numbers_do_is_not_unfolded(tmp_path, monkeypatch):
    from vitprobe.results import reading

    result = measured(pixels())
    result.save(tmp_path / "x")
    more = io.BytesIO()
    np.save(more, np.zeros(2**23, np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", more.getvalue())
    assert load_result(tmp_path / "x.npz").layers.tolist() == result.layers.tolist()
    monkeypatch.setattr(reading, "MUCH", 2**22)
    monkeypatch.setattr(reading, "read_all", lambda path: pytest.fail("unfolded"))
    with pytest.raises(VitprobeError, match="is not a result file of vitprobe, or damaged"):
        load_result(tmp_path / "x.npz")


def test_layers_that_are_numbers_are_refused(tmp_path):
    measured(pixels()).save(tmp_path / "x")
    with np.load(tmp_path / "x.npz") as loaded:
        arrays = dict(loaded)
    arrays["layers"] = np.zeros(arrays["layers"].shape)
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(VitprobeError, match=r"layers in .* are numbers, not names"):
        load_result(tmp_path / "x.npz")


def test_names_of_models_in_files_are_drawn_as_what_can_be_shown(tmp_path):
    result = measured(pixels())
    result.meta["models"][0]["name"] = "a\udcff\x1b[2J\n$\\frac$"
    (tmp_path / "x.npz").write_bytes(result.npz())
    again = load_result(tmp_path / "x.npz")
    assert again.models == ["a\ufffd\\x1b[2J\\n$\\frac$"]
    assert [path.name for path in again.save(tmp_path / "y")] == ["y.png", "y.npz"]


def test_files_are_written_all_or_none_where_a_folder_has_a_name(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(VitprobeError, match="b cannot be written: a folder has its name"):
        write_atomically({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert os.listdir(tmp_path) == ["b"]


def test_a_folder_in_the_place_of_the_figure_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    from vitprobe.report import command as report_command

    monkeypatch.setattr(cka, "measure", lambda *given, **options: pytest.fail("measured"))
    for name in ("x.svg", "x.html"):
        (tmp_path / name).mkdir()
    arguments = ["--models", "resnet_box", "--out", str(tmp_path), "--stem", "x"]
    assert cka.main([*arguments, "--format", "svg"]) == 2
    assert "x.svg cannot be written: a folder has its name" in capsys.readouterr().err
    assert report_command.main([*arguments, "--only", "cka"]) == 2
    assert "x.html cannot be written: a folder has its name" in capsys.readouterr().err
