"""Features of others and folders of ``vitprobe extract`` that are odd or damaged."""

import json

import numpy as np
import pytest
import torch

from vitprobe import VitprobeError, cka, linear_probe
from vitprobe.extract import extract

Y = np.arange(24) % 3
FEATURES = np.eye(3)[Y] + np.random.default_rng(0).normal(size=(24, 3)) / 100


def probed(path):
    return linear_probe.from_features(str(path), shots=2, draws=1)


def test_labels_beside_features_are_labels_whatever_their_shape(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, a=FEATURES, labels=Y[:, None])
    assert np.nanmax(probed(path).accuracy) == 1
    assert cka.from_features(str(path)).layers.tolist() == ["a"]
    for labels, message in (
        (Y[:-1], "23 labels for 24 images"),
        (np.eye(3, dtype=int)[Y], "one-hot"),
    ):
        np.savez(path, a=FEATURES, labels=labels)
        with pytest.raises(VitprobeError, match=message):
            probed(path)
    np.savez(path, x=FEATURES, y=2 * FEATURES)
    assert cka.from_features(str(path)).layers.tolist() == ["x", "y"]


def test_features_of_the_other_byte_order_are_the_same_numbers():
    found = [cka.from_features({"m": {"a": array, "b": array**2}}).cka
             for array in (FEATURES, FEATURES.astype(">f8"))]  # fmt: skip
    np.testing.assert_array_equal(*found)


def test_layers_without_features_are_refused():
    with pytest.raises(VitprobeError, match=r"must be numbers \(n, ...\), not float64 \(24, 0\)"):
        cka.from_features({"m": FEATURES[:, :0]})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["images"], None),
        (["images", "sha256"], 5),
        (["labels"], [0]),
        (["labels"], ["a"] * 12),
        (["labels"], [9] * 12),
        (["classes"], "x"),
        (["image_names"], [1] * 12),
        (["models", 0, "name"], []),
        (["models", 0, "weights"], None),
        (["readout"], 3),
        (["layers", 0, "of_image"], 7),
        (["layers", 0, "shape"], [12, 7]),
        (["layers", 0, "places"], {"grid": [1, 2]}),
    ],
)
def test_what_a_folder_says_of_itself_is_checked_before_use(path, value, tmp_path):
    torch.manual_seed(0)
    images = torch.utils.data.TensorDataset(torch.rand(12, 3, 32, 32), torch.arange(12) % 2)
    folder = extract("test_vit@random", images, out=tmp_path, image_size=32, quiet=True,
                     readout="mean")["test_vit (random)"]  # fmt: skip
    assert len(probed(folder).meta["classes"]) == 2
    meta = json.loads((folder / "meta.json").read_text())
    *above, last = path
    place = meta
    for key in above:
        place = list(place.values())[key] if isinstance(place, dict) and key == 0 else place[key]
    place[last] = value
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(VitprobeError, match="is no folder of vitprobe extract"):
        probed(folder)
