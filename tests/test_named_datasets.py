"""Data sets by name, through timm, and the labels that libraries' data sets carry."""

import sys
from copy import copy
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from vitprobe import VitprobeError, linear_probe, open_images
from vitprobe.images.datasets import labels_of


@pytest.fixture
def datasets_of_torch(pictures, monkeypatch):
    """The folder of test images where torchvision's data sets are kept."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(pictures.parent / "hub"))
    pictures.rename(pictures.parent / "datasets")
    return pictures.parent / "datasets"


def test_torchvisions_data_sets_by_name_bring_their_labels(datasets_of_torch):
    images = open_images("torch/image_folder")
    assert len(images) == 12 and images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0] * 6 + [1] * 6
    plain = torchvision.datasets.ImageFolder(str(datasets_of_torch))
    for i in (0, 11):
        assert images.items[i].tobytes() == plain[i][0].tobytes()
    found = linear_probe.measure(
        "vit_gap_box@random", "torch/image_folder", shots=2, draws=1, image_size=32
    )
    assert found.meta["n"] == 8 and np.isfinite(found.accuracy[:, 0]).all()


def opened(path):
    with Image.open(path) as image:
        return image.copy()


class Picture:
    """A column's type."""

    def __init__(self, decode=True):
        self.decode = decode


class Table:
    """A data set of Hugging Face: rows of columns; a column can be cast that was not there."""

    def __init__(self, root, column, columns=()):
        self.paths = sorted(Path(root).rglob("*.png"))
        self.column = column
        self.column_names = columns or (column, "label")
        label = SimpleNamespace(names=["cat", "dog"], num_classes=2)
        self.features = {column: Picture(), "label": label}
        self.info = SimpleNamespace(features={"label": label}, splits=None)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, at):
        if at == "label":
            return [int(path.parent.name == "dog") for path in self.paths]
        row = dict.fromkeys(self.column_names)
        if self.features[self.column].decode:
            row[self.column] = opened(self.paths[at])
        else:
            row[self.column] = {"bytes": self.paths[at].read_bytes(), "path": None}
        return row

    def cast_column(self, name, kind):
        if name == self.column:
            self.features[name] = kind
        else:
            self.column_names = (*self.column_names, name)
        return self

    def select_columns(self, names):
        chosen = copy(self)
        chosen.column_names = tuple(names)
        return chosen


@pytest.fixture
def hugging_face(pictures, monkeypatch):
    """Its library, with a few tables."""
    known = {
        "there": Table(pictures, "image"),
        "cifar": Table(pictures, "img"),
        "text": Table(pictures, "words"),
    }
    library = ModuleType("datasets")
    library.load_dataset = lambda name, **_: known[name]
    library.Image, library.ClassLabel = Picture, SimpleNamespace
    monkeypatch.setitem(sys.modules, "datasets", library)
    for name in ("timm.data.readers.reader_hfds", "timm.data.readers._hfds"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", ["there", "cifar"])
def test_data_sets_of_hugging_face_bring_their_labels(name, pictures, hugging_face):
    images = open_images(f"hfds/{name}:train")
    assert images.classes == ("cat", "dog") and len(images) == 12
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        assert images.classes[images.labels[i]] == path.parent.name
        assert images.items[i].tobytes() == opened(path).tobytes()


def test_whatever_a_library_of_data_sets_raises_is_one_line(hugging_face):
    for name, message in [
        ("gone", r"The dataset hfds/gone cannot be opened: 'gone'"),
        ("", "The dataset hfds/ cannot be opened"),
        ("text", "hfds/text has no images under image, pixel_values, .*: it has words, label"),
    ]:
        with pytest.raises(VitprobeError, match=message):
            open_images(f"hfds/{name}")


def items(**more):
    return type("Items", (), {"__len__": lambda self: 3, "__getitem__": None, **more})()


def test_labels_by_another_name_and_classes_of_one_name():
    svhn = items(labels=np.array([2, 0, 1]))
    assert list(labels_of(svhn)[0]) == [2, 0, 1] and labels_of(svhn)[1] == []
    cranes = [("crane",), ("maillot", "tank suit"), ("crane",)]
    assert labels_of(items(targets=[0, 1, 2], classes=cranes))[1] == [
        "crane (0)", "maillot, tank suit", "crane (2)",
    ]  # fmt: skip
    # What is called labels and is none: a method, names of another number.
    assert labels_of(items(labels=lambda self: []))[0] is None
    assert labels_of(items(labels=["a", "b"]))[0] is None
