"""Activations on disk: what passes give, through a kill, in two processes; and back into CKA."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

import vitprobe
from vitprobe import cka, extract
from vitprobe.__main__ import main
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap

OPTIONS = {"batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def models():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=32).eval()
    return [wrap(vit, "vit"), wrap(timm.create_model("test_resnet").eval(), "cnn")]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    extract.extract(models(), images, dtype="float32", out=out, **OPTIONS)
    return out


def array(folder, layer):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return np.load(folder / meta["layers"][layer]["file"], mmap_mode="r")


def test_rows_are_the_images_in_the_order_that_is_said(whole, images):
    meta = json.loads((whole / "vit" / "meta.json").read_text(encoding="utf-8"))
    order = [int(name.rpartition(" ")[2]) for name in meta["image_names"]]
    assert sorted(order) == list(range(16)) and order != sorted(order)
    vit = models()[0]
    with torch.no_grad(), vitprobe.capture(vit, "blocks", example=images) as seen:
        vit(images[order])
    for label in seen:
        np.testing.assert_allclose(array(whole / "vit", label), seen[label], rtol=1e-5, atol=1e-6)
    assert meta["models"][0]["weights_sha256"] == vit.weights_sha256()


def test_readouts(images, tmp_path):
    folders = {
        readout: extract.extract(
            models()[0], images, layers="blocks.1", readout=readout, dtype="float64",
            out=tmp_path / readout, **OPTIONS,
        )["vit"]
        for readout in extract.READOUTS
    }  # fmt: skip
    found = {readout: array(folder, "blocks.1") for readout, folder in folders.items()}
    everything = found["all"]
    np.testing.assert_array_equal(found["class"], everything[:, 0])
    np.testing.assert_allclose(found["mean"], everything[:, 1:].mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["tokens"].reshape(16, 4, -1), everything[:, 1:])
    with pytest.raises(VitprobeError, match="no class token"):
        extract.extract(models()[1], images, readout="class", out=tmp_path / "x", **OPTIONS)


def test_a_finished_folder_is_not_made_again(whole, images, monkeypatch):
    monkeypatch.setattr(extract, "run", None)
    extract.extract(models(), images, dtype="float32", out=whole, **OPTIONS)
    with pytest.raises(TypeError):
        extract.extract(models(), images, dtype="float32", out=whole, **OPTIONS, fresh=True)
    with pytest.raises(TypeError):
        extract.extract(
            models()[0], images, dtype="float32", out=whole, **OPTIONS, layers="blocks.1"
        )


COMMAND = ["--models", "test_vit@random", "--image-size", "32", "--num-images", "12"]
COMMAND += ["--device", "cpu", "--batch-size", "2", "--quiet", "--save-every", "0"]
COMMAND += ["--dtype", "float32"]


def test_a_killed_run_resumes_in_two_processes(tmp_path):
    # Another number of threads may change float32's last digits: one each, everywhere.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert extract.main([*COMMAND, "--out", str(tmp_path / "whole")]) == 0
    code = (
        "import os, sys; from vitprobe import extract; real, seen = extract.read, []\n"
        "def read(*a):\n    seen.append(1)\n"
        "    len(seen) > 40 and os.kill(os.getpid(), 9)\n    return real(*a)\n"
        "extract.read = read; sys.exit(extract.main(sys.argv[1:]))"
    )
    parts = [*COMMAND, "--out", str(tmp_path / "parts")]
    died = subprocess.run([sys.executable, "-c", code, *parts], env=one_thread)
    assert died.returncode in (-9, 9)  # Windows has its own way to count
    assert not list((tmp_path / "parts").rglob("meta.json"))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, *run, "vitprobe.extract", *parts], capture_output=True, text=True,
        env=one_thread,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (next((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    for file in one.glob("*.npy"):
        np.testing.assert_array_equal(np.load(file), np.load(two / file.name))
    assert [file.name for file in (tmp_path / "parts").iterdir()] == [two.name]


def test_too_much_for_the_disk_and_for_the_type_is_said_first(images, tmp_path, monkeypatch):
    monkeypatch.setattr(extract.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(VitprobeError, match=r"take .* GB, and 0.00 GB are free"):
        extract.extract(models(), images, out=tmp_path / "a", **OPTIONS)
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    with pytest.raises(VitprobeError, match=r"float16 cannot hold.*--dtype float32"):
        extract.extract(models()[0], 1e9 * images, layers="patch_embed", out=tmp_path, **OPTIONS)


def test_cka_of_features_is_cka_of_passes(whole, images):
    measured = cka.measure(models(), images, **OPTIONS)
    stored = cka.from_features([whole / "vit", whole / "cnn"], batch_size=4)
    assert stored.layers.tolist() == measured.layers.tolist()
    # Grams of float32 features round otherwise where a layer lies otherwise in memory: with four
    # images a batch, either is within 1.2e-5 of a computation in float64.
    np.testing.assert_allclose(stored.cka, measured.cka, atol=3e-5)
    np.testing.assert_allclose(stored.cka_se, measured.cka_se, atol=1e-4)
    same = [(one.claim, one.verdict, one.over) for one in stored.findings()]
    assert same == [(one.claim, one.verdict, one.over) for one in measured.findings()] != []
    stored.plot()
    assert len(cka.from_features(whole, batch_size=4).models) == 2


def test_features_of_others(tmp_path):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 10)), generator.normal(size=(40, 7))
    one = cka.from_features({"a": {"x": x, "y": y}, "b": {"y": torch.from_numpy(y)}}, batch_size=40)
    exact = cka.from_features({"a": x, "b": y}, batch_size=40, seed=None)
    assert one.cka[1, 2] == pytest.approx(1) and one.findings() == []
    assert exact.cka[0, 1] == pytest.approx(one.cka[0, 1])
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.save(tmp_path / "b.npy", y)
    files = [str(tmp_path / "a.npz"), str(tmp_path / "b.npy")]
    out = ["--out", str(tmp_path), "--stem", "f", "--batch-size", "40", "--quiet"]
    assert main(["cka", "--features", *files, *out]) == 0
    found = vitprobe.load_result(tmp_path / "f.npz")
    np.testing.assert_allclose(found.cka, one.cka, rtol=1e-9)
    # Rows that are sorted by class make batches of one class: they are taken in a seeded order.
    batched = cka.from_features({"a": x, "b": y}, batch_size=10)
    assert not np.allclose(batched.cka, cka.from_features({"a": x, "b": y}, batch_size=10,
                                                          seed=None).cka)  # fmt: skip


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": np.ones((8, 2)), "b": np.ones((9, 2))}, "of 9 images, those of a of 8"),
        ({"a": np.full((8, 2), np.nan)}, "features of a are not finite"),
        ({"a": np.array(["x"] * 8)[:, None]}, "must be numbers"),
        ({"a": np.ones((3, 2))}, "at least 4 images"),
        ({}, "no features"),
        (["nowhere"], "no such file or folder: 'nowhere'"),
    ],
)
def test_wrong_features_are_one_line(features, message):
    with pytest.raises(VitprobeError, match=message):
        cka.from_features(features)


def test_images_in_another_order_are_told(images, tmp_path):
    for seed in (0, 1):
        extract.extract(models()[0], images, layers="blocks.1", readout="mean",
                        out=tmp_path / str(seed), seed=seed, **OPTIONS)  # fmt: skip
    with pytest.raises(VitprobeError, match="in another order: image 0 is"):
        cka.from_features([tmp_path / "0", tmp_path / "1"])


def test_names_that_differ_in_case_alone_are_one_folder_elsewhere(images, tmp_path):
    with pytest.raises(VitprobeError, match="would be written to one folder"):
        extract.extract(models(), images, out=tmp_path, names=["net", "Net"], **OPTIONS)
