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
        (tmp_path / "pictured", "There is no .*pictured. Did you mean pictures"),
        (tmp_path / "empty", "no images in the folder"),
        (tmp_path / "note.txt", "neither a folder of images nor"),
        (tmp_path / "torn.npz", "cannot be read as arrays"),
        (tmp_path / "torn.tar", "cannot be read as a tar|no images in the tar"),
        (tmp_path / "p.tar.gz", "compressed tar"),
        (tmp_path / "flat.npy", r"must be uint8 \(n, H, W, 3\), not float64 \(3, 4\)"),
        (tmp_path / "object.npz", "cannot be read as arrays"),
        ("wds/shards", "stream"),
        ("torch/nothing", "cannot be opened: Unknown"),
        (torch.zeros(3, 4), "must be float"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no images in an array"),
    ]:
        with pytest.raises(VitprobeError, match=message) as caught:
            open_images(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(VitprobeError, match="13 images were asked for, but pictures has 12"):
        open_images(pictures, num_images=13)
    with pytest.raises(VitprobeError, match="at least 1, not 0"):
        open_images(pictures, num_images=0)
