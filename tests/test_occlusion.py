"""Dropped and shuffled cells: pixels by hand, predictions by loops over the same images."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitprobe.errors import VitprobeError
from vitprobe.models.loading import load_models, wrap
from vitprobe.occlusion import measure
from vitprobe.results.result import FAILS, HOLDS, OPEN, load_result
from vitprobe.statistics.occlusion import cell_edges, dropped, order_of_cells, shuffled
from vitprobe.tracing.classifier import class_output
from vitprobe.tracing.layers import map_layers


def numbered(n, height, width, channels=3):
    """Images whose pixels are all different."""
    return torch.arange(n * channels * height * width).reshape(n, channels, height, width).float()


def orders(n, count, what="drop"):
    return np.stack([order_of_cells(0, i, what, count) for i in range(n)])


class TestDropped:
    @pytest.mark.parametrize("size", [(28, 28), (28, 42), (17, 30)])
    @pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.9])
    def test_whole_cells_and_as_many_as_asked_for(self, size, share):
        images = numbered(3, *size) + 1
        found = dropped(images, orders(3, 196), share, 14, torch.zeros(1))
        gone = (found == 0).all(1)
        assert torch.equal(gone, (found == 0).any(1)) and (found[~(found == 0)] > 0).all()
        assert torch.equal(found[found != 0], images[found != 0])
        y, x = (cell_edges(side, 14) for side in size)
        assert y[0] == 0 and y[-1] == size[0] and np.ptp(np.diff(y)) <= 1
        for mask in gone:
            cells = [bool(mask[y[r] : y[r + 1], x[c] : x[c + 1]].all())
                     for r in range(14) for c in range(14)]  # fmt: skip
            some = [bool(mask[y[r] : y[r + 1], x[c] : x[c + 1]].any())
                    for r in range(14) for c in range(14)]  # fmt: skip
            assert cells == some and sum(cells) == round(share * 196)

    def test_more_is_less_of_the_same_and_each_image_has_its_own(self):
        images = torch.ones(2, 1, 28, 28)
        few, many = (dropped(images, orders(2, 196), share, 14, torch.zeros(1)) == 0
                     for share in (0.3, 0.6))  # fmt: skip
        assert (few <= many).all() and not torch.equal(few[0], few[1])
        again = order_of_cells(0, 1, "drop", 196)
        np.testing.assert_array_equal(again, orders(2, 196)[1])
        assert not np.array_equal(again, order_of_cells(1, 1, "drop", 196))

    def test_the_fill_is_what_is_said(self):
        images = torch.rand(2, 3, 28, 28)
        own = images.mean((2, 3), keepdim=True)
        found = dropped(images, orders(2, 196), 0.5, 14, own)
        changed = found != images
        assert torch.equal(found[changed], own.expand_as(images)[changed])


class TestShuffled:
    @pytest.mark.parametrize("size", [(8, 8), (8, 12), (9, 10)])
    def test_cells_move_whole(self, size):
        images, order = numbered(2, *size), orders(2, 16, "shuffle 4")
        found = shuffled(images, order, 4)
        high, wide = size[0] // 4, size[1] // 4
        for i in range(2):
            for place, cell in enumerate(order[i]):
                r, c, rr, cc = *divmod(place, 4), *divmod(int(cell), 4)
                new = found[i, :, r * high : (r + 1) * high, c * wide : (c + 1) * wide]
                old = images[i, :, rr * high : (rr + 1) * high, cc * wide : (cc + 1) * wide]
                assert torch.equal(new, old)
        assert torch.equal(found[:, :, 4 * high :], images[:, :, 4 * high :])
        assert torch.equal(found.flatten(1).sort().values, images.flatten(1).sort().values)

    def test_the_identity_changes_nothing(self):
        images = numbered(2, 8, 8)
        assert torch.equal(shuffled(images, np.tile(np.arange(4), (2, 1)), 2), images)


class Mean(nn.Module):
    """Predicts from the mean colour: no order of cells changes that."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


class Corner(Mean):
    """Predicts from the upper left corner."""

    def forward(self, x):
        return self.head(x[:, :, :2, :2].mean((2, 3)))


def net(kind, seed=0):
    torch.manual_seed(seed)
    return wrap(kind().eval(), kind.__name__.lower())


@pytest.fixture
def images():
    return 3 * torch.randn(24, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def test_predictions_one_image_at_a_time(images):
    models = [net(Mean), net(Corner)]
    result = measure(models, images, levels=[0.5, 0.2], shuffle=[2], batch_size=7, seed=3)
    assert result.level.tolist() == ["clean", "0.2 dropped", "0.5 dropped", "2×2 shuffled"]
    assert result.dropped.tolist() == [0, 0.2, 0.5, 0] and result.shuffle.tolist() == [1, 1, 1, 2]
    for m, model in enumerate(models):
        kept = np.zeros(4)
        for i, image in enumerate(images):
            clean = model.module(image[None]).argmax()
            drops = order_of_cells(3, i, "drop", 196)[None]
            moved = shuffled(image[None], order_of_cells(3, i, "shuffle 2", 4)[None], 2)
            changed = [image[None], *(dropped(image[None], drops, share, 14, torch.zeros(1))
                                      for share in (0.2, 0.5)), moved]  # fmt: skip
            kept += [bool(model.module(x).argmax() == clean) for x in changed]
        share = kept / 24
        np.testing.assert_allclose(result.agreement[m], share)
        np.testing.assert_allclose(result.agreement_se[m], np.sqrt(share * (1 - share) / 23))
    told = [np.bincount(model.module(images).argmax(1)).max() / 24 for model in models]
    np.testing.assert_allclose(result.meta["commonest"], told)
    assert result.agreement[0, 3] == 1 and result.agreement[1, 3] < 0.95
    assert np.isnan(result.accuracy).all()


def test_other_batches_and_another_order_of_models_change_nothing(images):
    one = measure([net(Mean), net(Corner)], images, batch_size=7)
    other = measure([net(Corner), net(Mean)], images, batch_size=24)
    np.testing.assert_array_equal(one.agreement, other.agreement[::-1])
    assert not np.array_equal(
        one.agreement, measure([net(Mean), net(Corner)], images, seed=1).agreement
    )


def test_labels_give_accuracy_where_their_number_is_that_of_the_classes(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (30, 28, 28, 3)).astype(np.uint8)
    model = net(Mean)

    def transform(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5

    inputs = torch.stack([transform(one) for one in pixels])
    predicted = model.module(inputs).argmax(1).numpy()
    labels = np.where(np.arange(30) % 3 == 0, (predicted + 1) % 5, predicted)
    labels[:5] = np.arange(5)  # every class is there
    named = wrap(model.module, "net", transform=transform)
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels)
    result = measure(named, str(tmp_path / "x.npz"), levels=[0.5], shuffle=[])
    right = (labels == predicted).mean()
    assert result.accuracy[0, 0] == pytest.approx(right)
    assert result.accuracy_se[0, 0] == pytest.approx(np.sqrt(right * (1 - right) / 29))
    drops = np.stack([order_of_cells(0, i, "drop", 196) for i in range(30)])
    corner = wrap(net(Corner).module, "net", transform=lambda image: 9 * transform(image))
    shown = measure(corner, str(tmp_path / "x.npz"), levels=[0.5], shuffle=[]).accuracy[0]
    for found, x in zip(shown, (inputs, dropped(inputs, drops, 0.5, 14, torch.zeros(1)))):
        told = corner.module(9 * x).argmax(1).numpy()
        assert found == pytest.approx((told == labels).mean())
    assert shown[0] != shown[1]
    np.savez(tmp_path / "y.npz", images=pixels, labels=labels % 3)
    other = measure(named, str(tmp_path / "y.npz"), levels=[0.5], shuffle=[])
    assert np.isnan(other.accuracy).all() and "the images have 3 classes" in other._caption()


def test_fills(images):
    model = net(Mean)
    own = measure(model, images, fill="image", levels=[0.9], shuffle=[])
    mean = measure(model, images, levels=[0.9], shuffle=[])
    assert own.agreement[0, 1] > mean.agreement[0, 1]  # the mean colour is what it reads
    with pytest.raises(VitprobeError, match="What is black for mean is not known"):
        measure(model, images, fill="black")
    measure("test_vit@random", np.zeros((4, 32, 32, 3), np.uint8), fill="black", image_size=32,
            levels=[0.5], shuffle=[])  # fmt: skip


def test_black_is_what_the_transform_makes_of_black():
    model = load_models("test_vit@random")[0]
    seen = []
    handle = model.module.register_forward_hook(lambda m, given, out: seen.append(given[0]))
    measure(model, np.full((4, 160, 160, 3), 255, np.uint8), fill="black", levels=[0.9], shuffle=[],
            batch_size=4)  # fmt: skip
    handle.remove()
    black = model.transform(Image.fromarray(np.zeros((160, 160, 3), np.uint8)))[:, 0, 0]
    changed = next(one for one in reversed(seen) if len(one) == 4).permute(0, 2, 3, 1)
    gone = torch.isclose(changed, black, atol=1e-6).all(-1).double().mean()
    assert gone == pytest.approx(round(0.9 * 196) / 196, abs=0.02)


@pytest.mark.parametrize(("name", "options", "classes"), [
    ("test_vit", {"num_classes": 7}, 7),
    ("test_vit", {"num_classes": 0}, None),
    ("test_resnet", {"num_classes": 7}, 7),
    ("test_resnet", {"num_classes": 0}, None),
    ("test_convnext", {"num_classes": 4}, 4),
    ("test_vit", {"num_classes": 7, "class_token": False, "global_pool": "avg"}, 7),
])  # fmt: skip
def test_what_is_a_classifier(name, options, classes):
    module = timm.create_model(name, **options).eval()
    found = class_output(map_layers(name, module, torch.randn(2, 3, 160, 160)))
    assert (found == ("", classes)) if classes else isinstance(found, str)


def test_what_cannot_be_is_told(images):
    features = wrap(timm.create_model("test_resnet", num_classes=0).eval(), "features")
    with pytest.raises(VitprobeError, match="features predicts no classes: its output does not"):
        measure(features, images)
    for options, line in (
        ({"levels": [1.0]}, "--levels must be above 0 and below 1, not 1"),
        ({"shuffle": [1]}, "--shuffle must be at least 2 cells a side, not 1"),
        ({"levels": [], "shuffle": []}, "--levels and --shuffle are both empty"),
        ({"fill": "grey"}, "--fill must be one of mean, black, image, not 'grey'"),
        ({"shuffle": [40]}, "mean sees 28×28 pixels, fewer than the 40×40 cells"),
    ):
        with pytest.raises(VitprobeError, match=line):
            measure(net(Mean), images, **options)


def test_findings_and_figures(images, tmp_path):
    result = measure([net(Mean), net(Corner)], images, levels=[0.5], shuffle=[2, 4])
    assert not result.findings()  # neither attends
    result.meta["attends"], result.meta["commonest"] = [True, False], [0.3, 0.3]
    result.agreement_se[:] = 0.02
    for vit, cnn, verdict in ((0.9, 0.4, HOLDS), (0.4, 0.9, FAILS), (0.55, 0.5, OPEN)):
        result.agreement[0, 1:], result.agreement[1, 1:] = vit, cnn
        assert [one.verdict for one in result.findings()] == [verdict] * 2
    ax = result.plot(result.figure().subplots())
    np.testing.assert_array_equal(ax.containers[1][0].get_ydata(), result.agreement[1, :2])
    result.save(tmp_path / "x")
    load_result(tmp_path / "x.npz").to_csv(tmp_path / "x.csv")
    result.meta["models"][0]["weights"] = "random, seed 0"
    assert not result.findings()
