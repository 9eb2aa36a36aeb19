"""Folders, tars, arrays: the same images in the same order, and what cannot be opened."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vitprobe import VitprobeError, open_images
from vitprobe.images.decoding import rgb


def test_a_folder_is_searched_recursively_in_a_seeded_order(pictures):
    images = open_images(pictures)
    assert len(images) == 12 and images.classes == ("cat", "dog")
    assert sorted(images.order) == list(range(12)) and list(images.order) != list(range(12))
    assert [images.name(i) for i in range(12)] == [open_images(pictures).name(i) for i in range(12)]
    for i in range(12):
        expected = Image.open(pictures / images.name(i))
        assert images.open(i).tobytes() == expected.tobytes()
        assert images.classes[images.chosen_labels()[i]] == images.name(i).split("/")[0]


def test_a_choice_is_the_start_of_the_whole_order_and_follows_the_seed(pictures):
    whole, some = open_images(pictures), open_images(pictures, num_images=5)
    assert list(some.order) == list(whole.order[:5])
    other = open_images(pictures, num_images=5, seed=1)
    assert list(other.order) != list(some.order)
    assert len({whole.digest, some.digest, other.digest}) == 3
    (pictures / "dog" / "0.png").write_bytes(b"changed")
    assert open_images(pictures).digest != whole.digest


def test_tar_npz_npy_and_array_give_the_folders_pixels(pictures, tmp_path):
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(pictures, "p")
    folder, tar = open_images(pictures), open_images(tmp_path / "p.tar")
    assert tar.classes == folder.classes
    assert [f"p/{folder.name(i)}" for i in range(12)] == [tar.name(i) for i in range(12)]
    array = np.stack([np.asarray(folder.open(i)) for i in range(12)])
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array, labels=np.arange(12))
    opened = [open_images(tmp_path / "a.npy"), open_images(tmp_path / "a.npz"), open_images(array)]
    for images in opened:
        assert all(
            np.array_equal(np.asarray(images.open(i)), array[images.order[i]]) for i in range(12)
        )
    assert list(opened[1].chosen_labels()) == list(opened[1].order)
    assert not list(tmp_path.glob("*pickle*"))


def test_a_float_tensor_goes_as_it_is():
    tensor = torch.randn(5, 3, 4, 4)
    images = open_images(tensor)
    assert images.are_tensors and torch.equal(images.open(2), tensor[images.order[2]])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16", "F"])
def test_every_kind_of_picture_becomes_8_bit_rgb(mode, tmp_path):
    grey = np.tile(np.linspace(0, 1, 16), (16, 1))
    if mode == "I;16":
        image = Image.fromarray((grey * 65535).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32))
    else:
        image = Image.fromarray((grey * 255).round().astype(np.uint8)).convert(mode)
    pixels = np.asarray(rgb(image))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    # Dark at the left and bright at the right, not clipped to white.
    assert pixels[:, :4].mean() < 90 and pixels[:, -4:].mean() > 165
    if mode != "1":
        assert 90 < pixels[:, 7:9].mean() < 165


def test_exif_rotation_is_applied_and_animations_give_their_first_frame(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert rgb(Image.open(tmp_path / "turned.png")).size == (2, 4)
    assert np.asarray(rgb(Image.open(tmp_path / "moving.gif")))[0, 0].tolist() == [255, 0, 0]


def test_wrong_sources_get_one_line(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04torn")
    (tmp_path / "torn.tar").write_bytes(b"torn")
    (tmp_path / "p.tar.gz").write_bytes(b"")
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    np.savez(tmp_path / "object.npz", images=np.array([{}], dtype=object))
    for source, message in [
        (tmp_path / "pictured", "--images: no such .*pictured'. Did you mean pictures"),
        (tmp_path / "empty", "no images in the folder"),
        (tmp_path / "note.txt", "neither a folder of images nor"),
        (tmp_path / "torn.npz", "cannot be read as arrays"),
        (tmp_path / "torn.tar", "cannot be read as a tar|no images in the tar"),
        (tmp_path / "p.tar.gz", "compressed tar"),
        (tmp_path / "flat.npy", r"must be uint8 \(n, H, W, 3\), .* not float64 \(3, 4\)"),
        (tmp_path / "object.npz", "cannot be read as arrays"),
        ("wds/shards", "stream"),
        ("torch/nothing", "cannot be opened: Unknown"),
        (torch.zeros(3, 4), "must be float"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no images in an array"),
    ]:
        with pytest.raises(VitprobeError, match=message) as caught:
            open_images(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(VitprobeError, match="--num-images: pictures has 12 images, not 13"):
        open_images(pictures, num_images=13)
    with pytest.raises(VitprobeError, match="at least 1, not 0"):
        open_images(pictures, num_images=0)


def rgb_images(n=6):
    return np.random.default_rng(0).integers(0, 256, (n, 8, 10, 3), dtype=np.uint8)


def pixels(images):
    """What every image holds, in the order of the source."""
    return np.stack([np.asarray(images.items[i]) for i in range(len(images))])


def test_lists_and_datasets_give_the_pixels_of_the_array(tmp_path):
    array = rgb_images()
    as_pil = [Image.fromarray(one) for one in array]
    for i, one in enumerate(as_pil):
        one.save(tmp_path / f"{i}.png")

    class Labelled(torch.utils.data.Dataset):
        targets, classes = [1, 0, 1, 1, 0, 2], ["a", "b", "c"]

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return as_pil[index], self.targets[index]

    class Dicts(Labelled):
        targets = None

        def __getitem__(self, index):
            return {"label": 0, "image": as_pil[index]}

    sources = {
        "arrays": list(array),
        "PIL": tuple(as_pil),
        "paths": [tmp_path / f"{i}.png" for i in range(6)],
        "uint8 tensors": list(torch.from_numpy(array).permute(0, 3, 1, 2)),
        "dataset": Labelled(),
        "dicts": Dicts(),
    }
    for what, source in sources.items():
        images = open_images(source)
        np.testing.assert_array_equal(pixels(images), array, err_msg=what)
        assert not images.are_tensors
    labelled = open_images(Labelled())
    assert list(labelled.labels) == Labelled.targets and labelled.classes == ("a", "b", "c")
    other = [*as_pil[:-1], as_pil[0]]
    assert open_images(other).digest != open_images(as_pil).digest


def test_datasets_of_float_tensors_go_as_they_are():
    tensor = torch.randn(6, 3, 8, 8)
    dataset = torch.utils.data.TensorDataset(tensor, torch.arange(6))
    for source in (dataset, list(tensor)):
        images = open_images(source)
        assert images.are_tensors and torch.equal(images.items[4], tensor[4])
    with pytest.raises(ValueError, match="another kind of image, where the first item is a float"):
        open_images([tensor[0], rgb_images()[0]]).items[1]


def test_what_is_no_source_of_images_gets_one_line():
    for source, message in [
        ([], "no images in a list"),
        ([torch.zeros(4)], r"not an image: a tensor of torch.float32 \(4,\)"),
        ([{"text": 1}], "not an image: a dict with text, without 'image'"),
        ([np.zeros((4, 4))], r"not an image: an array of float64 \(4, 4\), not uint8"),
        ([3], "not an image: a int"),
        ({"a": 1}, "cannot be taken from a dict"),
        (iter([]), "cannot be taken from a list_iterator"),
    ]:
        with pytest.raises(VitprobeError, match=message):
            open_images(source)


def test_grey_arrays_and_files_are_the_same_images(tmp_path):
    grey = rgb_images()[..., 0]
    np.save(tmp_path / "grey.npy", grey)
    np.savez(tmp_path / "grey.npz", images=grey[..., None])
    for source in (grey, grey[..., None], tmp_path / "grey.npy", tmp_path / "grey.npz", list(grey)):
        images = open_images(source)
        np.testing.assert_array_equal(pixels(images), np.repeat(grey[..., None], 3, -1))


def test_labels_are_checked_against_the_images(tmp_path):
    from vitprobe.images.labelled import open_task

    x, y = np.repeat(rgb_images(3), 4, 0), np.repeat(np.arange(3), 4)
    path = tmp_path / "x.npz"

    def task(**arrays):
        np.savez(path, **arrays)
        return open_task(path, None, shots=2, draws=1, num_test=None, seed=0)

    wanted = task(images=x, labels=y)
    assert wanted.classes == ("0", "1", "2")
    names = np.array(["eel", "ant", "cat"])[y]
    for labels, classes in [
        (y[:, None], ("0", "1", "2")),
        (y.astype(np.uint8) + 7, ("7", "8", "9")),
        (y > 0, ("False", "True")),
        (names, ("ant", "cat", "eel")),
        (names.astype("S"), ("ant", "cat", "eel")),
    ]:
        found = task(images=x, labels=labels)
        assert found.classes == classes
        right = np.asarray(labels).reshape(-1)[found.test.order]
        right = [one.decode() if isinstance(one, bytes) else str(one) for one in right.tolist()]
        assert [classes[c] for c in found.test.chosen_labels()] == right
    for labels, message in [
        (np.eye(3, dtype=int)[y], r"shape \(12, 3\); if they are one-hot"),
        (y[:-1], "has 11 labels for 12 images"),
        (np.r_[0, y], "has 13 labels for 12 images"),
        (np.where(y == 1, np.nan, y), "must be integers, strings or booleans, not float64"),
        (np.array(1), "single value"),
        (y.reshape(3, 2, 2), r"must be \(n,\), not \(3, 2, 2\)"),
    ]:
        with pytest.raises(VitprobeError, match=message):
            task(images=x, labels=labels)
        assert len(open_images(path)) == 12  # what needs no labels does without


class Labelled6:
    """A data set with labels and classes as other people's code may give them."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return np.full((8, 8, 3), index, np.uint8), 0


class NoArray(list):
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")


@pytest.mark.parametrize(
    "targets, message",
    [
        ([[1], [1, 2], [1], [2], [3], [4]], "cannot be taken as an array: ValueError"),
        (NoArray([0] * 6), "cannot be taken as an array: RuntimeError: no array"),
        (["a", float("nan"), "a", "b", "b", "a"], "Some labels of .* are text and some are not"),
        ([1, "1", 2, "2", 1, "1"], "Some labels of .* are text and some are not"),
        ([None, "b", "a", "b", "a", "b"], "integers, strings or booleans, not object"),
        ({i: i % 2 for i in range(6)}, "are a dict: a list or array"),
        ("ababab", "are a str: a list or array"),
        (np.ma.array([0, 1] * 3, mask=[0, 0, 1, 0, 0, 0]), "are masked"),
        (torch.zeros(6, requires_grad=True), "not float32"),
    ],
)
def test_labels_of_no_kind_are_one_line_where_they_are_needed(targets, message):
    from vitprobe.images.labelled import open_task

    images = open_images(Labelled6(targets))
    assert len(images) == 6 and images.labels is None
    with pytest.raises(VitprobeError, match=message):
        open_task(Labelled6(targets), None, shots=1, draws=1, num_test=None, seed=0)


def test_labels_stay_as_many_classes_as_they_are():
    for targets, classes in [
        (np.array(["b", "a"] * 3, object), ("a", "b")),
        (np.array([2, 1] * 3, object), ("1", "2")),
        (np.array([b"\xff", b"\xfe"] * 3), ("\\udcfe", "\\udcff")),
    ]:
        images = open_images(Labelled6(targets))
        assert images.classes == classes and images.labels.tolist() == [1, 0] * 3


def test_which_array_holds_the_images_is_told_or_asked_for(tmp_path):
    x, path = rgb_images(), tmp_path / "x.npz"
    mask = np.ones((6, 8, 10), np.uint8)
    for arrays in (
        {"a_mask": mask, "images": x},
        {"targets": np.arange(6), "x_train": x},
        {"targets": np.arange(6), "data": x},
        {"z": x},
    ):
        np.savez(path, **arrays)
        np.testing.assert_array_equal(pixels(open_images(path)), x)
    np.savez(path, train_images=x, test_images=x)
    with pytest.raises(VitprobeError, match=r"not clear: it has train_images uint8\[6, 8, 10, 3\]"):
        open_images(path)


def header(shape, dtype="|u1", order="False"):
    text = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_array_files_that_lie_about_themselves_get_one_line(tmp_path):
    import zipfile

    huge = header((10**9, 10**6, 8, 3))
    contents = {
        "huge.npy": huge,
        "huge.npz": {"images": huge + b"0" * 100},
        "short.npy": header((6, 8, 10, 3)) + b"0" * 100,
        "version.npy": b"\x93NUMPY\x09\x09" + b"0" * 50,
        "no header.npy": b"\x93NUMPY\x01\x00\xff\xffnothing",
        "code.npy": header((1,), "__import__('os').system('true')"),
        "text.npz": {"images": b"no array"},
        "empty.npz": {},
        "objects.npz": {"images": header((1,), "|O") + b"0" * 8},
        "zeros.npz": None,
    }
    for name, content in contents.items():
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for key, member in (content or {}).items():
                    archive.writestr(f"{key}.npy", member)
        if content is None:
            np.savez_compressed(path, images=np.zeros((6, 8, 10, 3), np.uint8))
            data = bytearray(path.read_bytes())
            data[70] ^= 0xFF
            path.write_bytes(data)
        with pytest.raises(VitprobeError) as caught:
            open_images(path)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_an_archive_that_unfolds_beyond_the_memory_is_not_unfolded(tmp_path, monkeypatch):
    from vitprobe.images import arrays

    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((100, 64, 64, 3), np.uint8))
    monkeypatch.setattr(arrays, "memory", lambda: 10**6)
    with pytest.raises(VitprobeError, match="more than the memory here"):
        open_images(tmp_path / "x.npz")


def test_names_that_no_file_can_have_and_lengths_that_are_none_are_one_line():
    class Halves(list):
        def __len__(self):
            return -1

    for source, message in [
        ("~nobody of that name/x", "no such file or folder"),
        ("x" * 5000, "no such file or folder"),
        (Halves([1, 2]), "How many images a Halves holds is not clear"),
    ]:
        with pytest.raises(VitprobeError, match=message) as caught:
            open_images(source)
        assert len(str(caught.value)) < 400
