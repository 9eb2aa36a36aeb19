"""Measurements on stored features: those of the passes that the features come from."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

import vitprobe
from vitprobe import cka, frequency, linear_probe, neighbours
from vitprobe.__main__ import main
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap

OPTIONS = {"batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def images():
    """Noise in two classes that a little colour tells apart."""
    pixels = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = np.arange(48) % 2
    pixels[:, 0] += torch.from_numpy(labels)[:, None, None]
    return replace(open_images(pixels), labels=labels, classes=("even", "odd"))


def models():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=32, reg_tokens=2).eval()
    return [wrap(vit, "vit"), wrap(timm.create_model("test_resnet").eval(), "cnn")]


@pytest.fixture(scope="module")
def stored(images, tmp_path_factory):
    """Folders of the same features, by readout; of the ViT alone where the CNN has none."""
    found = {}
    for readout in ("all", "mean", "class", "tokens"):
        out = tmp_path_factory.mktemp(readout)
        chosen = models()[: 1 if readout == "class" else 2]
        folders = vitprobe.extract(
            chosen, images, readout=readout, dtype="float32", out=out, **OPTIONS
        )
        found[readout] = list(folders.values())
    return found


def compare(mine, theirs, **close):
    assert mine.layers.tolist() == theirs.layers.tolist()
    for name, array in theirs.arrays().items():
        if array.dtype.kind in "fiu":
            np.testing.assert_allclose(getattr(mine, name), array, err_msg=name, **close)


@pytest.mark.parametrize("readout", ["all", "mean", "tokens"])
def test_neighbours_of_features_are_those_of_the_passes(readout, images, stored):
    measured = neighbours.measure(models(), images, k=4, null=5, **OPTIONS)
    assert np.isfinite(measured.accuracy).all()
    mine = neighbours.from_features(stored[readout], k=4, null=5, **OPTIONS)
    compare(mine, measured, rtol=1e-6, atol=1e-9)
    assert mine.readout.tolist() == measured.readout.tolist()
    assert [one.numbers for one in mine.findings()] == [one.numbers for one in measured.findings()]
    mine.plot()


def test_class_tokens_are_read_where_they_were_stored(images, stored):
    measured = neighbours.measure(models()[0], images, k=4, null=0, readout="class", **OPTIONS)
    for readout in ("all", "class"):
        folder = stored[readout][0]
        mine = neighbours.from_features(folder, k=4, null=0, readout="class", **OPTIONS)
        compare(mine, measured, rtol=1e-6, atol=1e-9)
        assert set(mine.readout) == {"class token"}
    # They are what they are, whatever the command's default.
    assert set(neighbours.from_features(stored["class"], k=4).readout) == {"class token"}
    with pytest.raises(VitprobeError, match="no class tokens are among"):
        neighbours.from_features(stored["mean"], k=4, readout="class")
    with pytest.raises(VitprobeError, match="extract both with one --readout"):
        neighbours.from_features([stored["mean"][1], stored["class"][0]], k=4)


def test_probes_of_features_are_those_of_the_passes(images, stored):
    asked = {"shots": 4, "draws": 2, **OPTIONS}
    measured = linear_probe.measure(models(), images, **asked)
    assert np.nanmin(measured.accuracy) < np.nanmax(measured.accuracy)
    compare(linear_probe.from_features(stored["all"], **asked), measured, rtol=1e-3, atol=1e-9)
    mine = linear_probe.from_features(stored["mean"], **asked)
    column = measured.readouts.tolist().index("mean")
    np.testing.assert_allclose(mine.accuracy[:, column], measured.accuracy[:, column], rtol=1e-6)
    assert np.isnan(np.delete(mine.accuracy, column, 1)).all()
    mine.plot()
    assert mine.findings() == []
    with pytest.raises(VitprobeError, match="has no labels"):
        linear_probe.from_features({"a": np.ones((9, 3))}, shots=1)


@pytest.mark.parametrize("readout", ["all", "tokens"])
def test_frequencies_of_features_are_those_of_the_passes(readout, images, stored):
    measured = frequency.measure(models(), images, layers="blocks", **OPTIONS)
    mine = frequency.from_features(stored[readout], **OPTIONS)
    compare(mine, measured, rtol=1e-4, atol=1e-5)
    with pytest.raises(VitprobeError, match=r"blocks.0 of vit has no grid of places: 64 features"):
        frequency.from_features(stored["mean"])


def test_cka_of_features_has_a_chance_level_and_a_choice_of_layers(images, stored):
    measured = cka.measure(models(), images, null=8, **OPTIONS)
    mine = cka.from_features(stored["all"], null=8, **OPTIONS)
    compare(mine, measured, rtol=1e-3, atol=3e-5)
    (one,) = {len(cka.from_features(stored["all"][0], layers=what).layers)
              for what in ("blocks.0", 0, -1)}  # fmt: skip
    assert one == 1


def test_features_and_labels_of_others(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 4
    features = generator.normal(size=(40, 6)) + 3 * np.eye(6)[labels]
    mine = neighbours.from_features({"a": features}, labels=labels, k=5, null=0)
    assert mine.accuracy[0] > 0.8 and mine.readout.tolist() == ["as given"] == [*set(mine.readout)]
    assert mine.findings() == []
    np.savez(tmp_path / "a.npz", x=features, labels=[f"class {one}" for one in labels])
    for command in (["neighbours", "--k", "5", "--null", "0"], ["linear_probe", "--shots", "2"]):
        out = ["--out", str(tmp_path), "--stem", command[0], "--quiet"]
        assert main([*command, "--features", str(tmp_path / "a.npz"), *out]) == 0
    found = vitprobe.load_result(tmp_path / "neighbours.npz")
    np.testing.assert_allclose(found.accuracy, mine.accuracy)
    assert vitprobe.load_result(tmp_path / "linear_probe.npz").meta["classes"][0] == "class 0"


def test_what_goes_wrong_is_one_line(stored, tmp_path, capsys):
    cube = np.ones((12, 5, 4))
    with pytest.raises(VitprobeError, match=r"features of a are 5 × 4 an image, and nothing says"):
        neighbours.from_features({"a": cube}, k=2)
    with pytest.raises(VitprobeError, match="expected 2 different names"):
        cka.from_features(stored["all"], names=["one"])
    images = ["--images", str(tmp_path), "--out", str(tmp_path)]
    assert main(["neighbours", "--features", str(stored["all"][0]), *images]) == 2
    assert "--features stands in place of --images" in capsys.readouterr().err
