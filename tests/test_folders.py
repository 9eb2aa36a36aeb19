"""Folders of images: what is found in them, once, and which class it has."""

import os
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vitprobe import VitprobeError, cka, linear_probe, open_images
from vitprobe.images import folders
from vitprobe.images.labelled import open_task


def fill(folder, names, channel=0):
    """Images of 16 × 16 pixels, bright in one channel."""
    generator = np.random.default_rng(channel)
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., channel] += 150
        Image.fromarray(pixels).save(file)


def test_classes_are_the_folders_directly_under_the_root(tmp_path):
    fill(tmp_path / "r", ["class10/a/0.png", "class10/b/c/1.png", "class9/2.png"])
    images = open_images(tmp_path / "r")
    assert images.classes == ("class9", "class10")  # as people count
    assert list(images.names) == ["class9/2.png", "class10/a/0.png", "class10/b/c/1.png"]
    assert list(images.labels) == [0, 1, 1]
    fill(tmp_path / "plain", ["0.png", "1.png"])
    assert open_images(tmp_path / "plain").labels is None


@pytest.mark.parametrize(
    ("members", "classes"),
    [
        (["cat/0.png", "dog/day/0.png"], ("cat", "dog")),
        (["data/train/cat/0.png", "data/train/dog/day/0.png"], ("cat", "dog")),
        (["./cat/0.png", "./dog/0.png", "./__MACOSX/cat/._0.png"], ("cat", "dog")),
        (["cat/0.png", "cat/1.png"], ("cat",)),
        (["0.png", "1.png"], ()),
    ],
)
def test_classes_of_a_tar(members, classes, tmp_path):
    fill(tmp_path, ["x.png"])
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for name in members:
            tar.add(tmp_path / "x.png", name)
    images = open_images(tmp_path / "p.tar")
    assert images.classes == classes
    assert not any("MACOSX" in name for name in images.names)
    if classes:
        for name, label in zip(images.names, images.labels):
            assert f"{classes[label]}/" in name
        assert images.open(0).size == (16, 16)


def test_hidden_files_and_what_systems_leave_are_no_images(tmp_path):
    fill(tmp_path, ["cat/0.png", "dog/1.png"])
    fill(tmp_path, ["cat/.ipynb_checkpoints/0.png", ".hidden/2.png", "__MACOSX/cat/3.png",
                    "dog/._1.png", "@eaDir/4.jpg", "dog/Thumbs.db/5.png"])  # fmt: skip
    images = open_images(tmp_path)
    assert list(images.names) == ["cat/0.png", "dog/1.png"] and images.classes == ("cat", "dog")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_every_real_folder_is_walked_once_and_only_files_are_read(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root, ["b/0.png", "b/c/1.png"])
    fill(outside, ["2.png"])
    (root / "self").symlink_to(".")
    (root / "b" / "up").symlink_to("..")
    (root / "b" / "c" / "up").symlink_to("../..")
    (root / "a").symlink_to("b")  # sorts before the folder itself, which keeps its name
    (root / "far").symlink_to(outside)
    (root / "one").symlink_to("other")
    (root / "other").symlink_to("one")
    (outside / "back").symlink_to(root)
    (root / "b" / "linked.png").symlink_to("0.png")
    (root / "b" / "nowhere.png").symlink_to("gone.png")
    os.mkfifo(root / "b" / "pipe.png")
    found = folders.image_files(root)
    assert found.names == ["b/0.png", "b/c/1.png", "b/linked.png", "b/nowhere.png", "far/2.png"]
    assert found.sizes[3] == -1 and min(found.sizes[:3]) > 0
    images = open_images(root)
    assert images.classes == ("b", "far")
    for name in ("x.npz", "x.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(VitprobeError, match="neither a folder nor a regular file"):
            open_images(tmp_path / name)


def test_images_of_kinds_that_are_not_read_are_told(tmp_path):
    noise = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    noise.save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.jfif")  # what browsers call a JPEG at times
    for name in ("b.HEIC", "c.avif", "d.heic", "notes.txt"):
        (tmp_path / name).touch()
    images = open_images(tmp_path)
    assert images.names == ["a.jfif"] and images.open(0).size == (8, 8)
    said = "3 files are of a kind that is not read and left out: .avif, .heic."
    assert images.remarks == (said,)
    (tmp_path / "a.jfif").unlink()
    with pytest.raises(VitprobeError, match=re.escape(said)):
        open_images(tmp_path)


def test_folders_that_cannot_be_listed_are_told_and_counted(tmp_path, monkeypatch):
    fill(tmp_path, ["a/0.png", "b/1.png", "c/d/2.png", "c/3.png"])
    listing = os.scandir

    def guarded(path):
        if str(path).endswith(("b", "d")):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", guarded)
    images = open_images(tmp_path)
    assert list(images.names) == ["a/0.png", "c/3.png"]
    said = (
        "2 folders cannot be read and are left out: b (Permission denied), c/d (Permission denied)."
    )
    assert images.remarks == (said,)
    monkeypatch.setattr(os, "scandir", lambda path: guarded("b"))
    with pytest.raises(VitprobeError, match=f"{tmp_path.name} cannot be read: Permission denied"):
        open_images(tmp_path)


def test_stray_images_are_left_out_of_labelled_tasks_and_named(tmp_path):
    for c, name in enumerate(("cat", "dog")):
        fill(tmp_path / "r", [f"{name}/{i}.png" for i in range(8)], c)
    fill(tmp_path / "r", ["stray.png", "stray too.png"], 2)
    assert len(open_images(tmp_path / "r")) == 18
    task = open_task(tmp_path / "r", None, shots=2, draws=1, num_test=None, seed=0)
    assert task.classes == ("cat", "dog") and len(task.test) == 12
    names = {one.name(i) for one in (*task.draws, task.test) for i in range(len(one))}
    assert not any("stray" in name for name in names)
    assert set(task.test.chosen_labels().tolist()) == {0, 1}
    said = "2 images directly in r belong to no class and are left out: stray too.png, stray.png."
    assert said in task.draws[0].remarks


def colours(folder, names):
    """Twelve images of each class, whose colour follows its number."""
    for name in names:
        generator = np.random.default_rng(int(name))
        level = np.array([int(name) % 3, int(name) // 3 % 3, int(name) // 9]) * 80 + 30
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 20, (16, 16, 3)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def test_test_classes_are_matched_by_name(tmp_path):
    """Of twelve classes sorted as numbers, a part sorted otherwise keeps its own labels."""
    colours(tmp_path / "fit", map(str, range(12)))
    colours(tmp_path / "test", ["10", "2"])
    colours(tmp_path / "one", ["11"])
    for test, classes in (("test", ["10", "2"]), ("one", ["11"])):
        task = open_task(tmp_path / "fit", tmp_path / test, 4, 1, None, 0)
        assert {task.classes[c] for c in task.test.chosen_labels()} == set(classes)
        for i in range(len(task.test)):
            assert task.test.name(i).startswith(f"{task.classes[task.test.chosen_labels()[i]]}/")
    options = {"shots": 4, "draws": 1, "layers": "last", "workers": 0}
    result = linear_probe.measure(
        "vit_small_box", tmp_path / "fit", test_images=tmp_path / "test", **options
    )
    assert np.nanmax(result.accuracy) > 0.9
    (tmp_path / "one" / "11").rename(tmp_path / "one" / "011")
    with pytest.raises(VitprobeError, match="The class '011' of the test images one is not in fit"):
        open_task(tmp_path / "fit", tmp_path / "one", 4, 1, None, 0)


@pytest.mark.skipif(os.name != "posix", reason="names are text there")
def test_classes_whose_names_are_no_text_stay_apart(tmp_path):
    names = ["a\udcfe", "a\udcff", "c"]
    for split, channel in (("fit", 0), ("test", 1)):
        fill(tmp_path / split, [f"{name}/{i}.bmp" for name in names for i in range(4)], channel)
    task = open_task(tmp_path / "fit", tmp_path / "test", 2, 1, None, 0)
    assert len(set(task.classes)) == 3
    for i, label in enumerate(task.test.chosen_labels()):
        name = task.test.names[task.test.order[i]]
        assert names[label] == name.split("/")[0]


def test_other_images_of_equal_names_and_sizes_may_test(tmp_path):
    names = [f"{c}/{i}.bmp" for c in "ab" for i in range(4)]
    fill(tmp_path / "fit", names, 0)
    fill(tmp_path / "test", names, 1)
    assert len(open_task(tmp_path / "fit", tmp_path / "test", 2, 1, None, 0).test) == 8
    fill(tmp_path / "copy", names, 0)
    with pytest.raises(VitprobeError, match="are the same images as fit"):
        open_task(tmp_path / "fit", tmp_path / "copy", 2, 1, None, 0)


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    fill(tmp_path / "r", [f"a/{i}.png" for i in range(8)])
    images = open_images(tmp_path / "r")
    cka.measure("test_vit@random", replace(images, remarks=("one thing",)), image_size=32,
                workers=0)  # fmt: skip
    assert capsys.readouterr().err.count("vitprobe: one thing\n") == 1


def tar_of(path, members):
    """A tar with an image under each name; a pair is a link under the first to the second."""
    fill(path.parent, ["x.png"])
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in members:
            if isinstance(name, str):
                tar.add(path.parent / "x.png", name)
            else:
                link = tarfile.TarInfo(name[0])
                link.type, link.linkname = tarfile.LNKTYPE, name[1]
                tar.addfile(link)
    return path.read_bytes()


def test_a_tar_of_which_a_part_cannot_be_read_is_not_taken_for_a_smaller_one(tmp_path):
    path = tmp_path / "p.tar"
    content = tar_of(path, [f"{c}/{i}.png" for c in "ab" for i in range(6)])
    header = content.index(b"b/2.png")
    for change, message in (
        (content[: header + 3] + b"?" + content[header + 4 :], f"damaged at byte {header}"),
        (content[:header] + bytes(512) + content[header + 512 :], f"damaged at byte {header}"),
        (content[: header + 100], f"damaged at byte {header}"),
        (content + content, "another tar was written behind its end"),
    ):
        path.write_bytes(change)
        with pytest.raises(VitprobeError, match=rf"p\.tar cannot be read as a tar: .*{message}"):
            open_images(path)
    # Tars that were not closed, or that have something else behind their end, are whole.
    end = content.rindex(b"IEND") // 512 * 512 + 512
    for change in (content[:end], content[: end + 512], content + b"something else"):
        path.write_bytes(change)
        assert len(open_images(path)) == 12


def test_links_in_a_tar_are_left_out_with_a_remark(tmp_path):
    tar_of(tmp_path / "p.tar", ["a/0.png", "b/1.png", ("b/2.png", "a/0.png"), ("c", "a/0.png")])
    images = open_images(tmp_path / "p.tar")
    assert len(images) == 2
    assert images.remarks == ("1 link in p.tar is left out: b/2.png.",)
