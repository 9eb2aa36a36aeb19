"""A DataLoader as images: its batches as they come, the same for every model and every run."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
)

import vitprobe
from vitprobe import cka, neighbours, skip_ratio
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.running.options import Options
from vitprobe.running.session import session
from vitprobe.statistics.hsic import gram, hsic

PIXELS = torch.randn(22, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(22) % 2


class Ready(Dataset):
    """(tensor, label), as datasets of people's own give them."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return PIXELS[index], int(LABELS[index])


class Pictures(Dataset):
    """Images and names, for a model's own transform."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return Image.new("RGB", (40, 36), (20 * index, 5, 250 - 20 * index)), f"{index}.png"


def net():
    torch.manual_seed(0)
    return wrap(timm.create_model("test_vit", img_size=32).eval(), "net")


def as_pairs(items):
    return [one for one, _ in items], [label for _, label in items]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Ready(), batch_size=8),
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=8),
        DataLoader(TensorDataset(PIXELS), batch_size=8),
        DataLoader(list(PIXELS), batch_size=8, collate_fn=torch.stack),
        DataLoader(
            Ready(), batch_size=8, collate_fn=lambda items: {"pixel_values": torch.stack(
                [one for one, _ in items])},
        ),
        DataLoader(Ready(), batch_size=8, collate_fn=list),
    ],
    ids=["pairs", "tensors and labels", "tensors", "bare", "dict", "list of pairs"],
)  # fmt: skip
def test_batches_are_the_loaders_own(loader):
    images = open_images(loader)
    assert images.are_tensors and [len(part) for part in images.batches] == [8, 8, 6]
    with session(net(), loader, Options(device="cpu", batch_size=3)) as ready:
        loaded = [batch.inputs[0] for batch, _ in ready.load([0, 1, 2])]
    for mine, theirs in zip(loaded, PIXELS.split(8), strict=True):
        assert torch.equal(mine, theirs)


def test_cka_sums_over_just_these_batches():
    loader = DataLoader(Ready(), batch_size=8)
    found = cka.measure(net(), loader, layers=["blocks.0", "blocks.5"], device="cpu")
    with vitprobe.capture(net(), ["blocks.0", "blocks.5"]) as seen, torch.no_grad():
        total = torch.zeros(2, 2, dtype=torch.float64)
        for images, _ in loader:
            seen._model(images)
            total += hsic(torch.stack([gram(seen[name]) for name in seen]))
    expected = total[0, 1] / (total[0, 0] * total[1, 1]).sqrt()
    assert found.cka[0, 1] == pytest.approx(float(expected), abs=1e-6)
    assert found.meta["batch_size"] == 8 and found.meta["n"] == 22
    # The option that counts without a loader says nothing here.
    again = cka.measure(net(), loader, layers=["blocks.0", "blocks.5"], device="cpu", batch_size=5)
    assert np.array_equal(again.cka, found.cka)


def test_images_of_a_loader_go_through_the_transforms():
    loader = DataLoader(Pictures(), batch_size=5, collate_fn=as_pairs)
    images = open_images(loader)
    assert not images.are_tensors and images.open(7).getpixel((0, 0)) == (140, 5, 110)
    model = vitprobe.load_model("vit_small_box@random")
    found = skip_ratio.measure(model, loader, device="cpu")
    other = skip_ratio.measure(model, [Pictures()[i][0] for i in range(12)], device="cpu")
    np.testing.assert_allclose(found.ratio, other.ratio, rtol=1e-5)


def test_num_images_are_the_first_and_labels_come_along():
    loader = DataLoader(TensorDataset(PIXELS, LABELS), batch_size=8, drop_last=True)
    images = open_images(loader, 11)
    assert [len(part) for part in images.batches] == [8, 3]
    assert images.chosen_labels().tolist() == LABELS[:11].tolist()
    found = neighbours.measure(net(), loader, k=3, null=0, device="cpu")
    assert found.meta["n"] == 16 and np.isfinite(found.accuracy).all()


def test_labels_of_torchs_own_datasets():
    both = ConcatDataset([Subset(TensorDataset(PIXELS, LABELS), [3, 4, 8]),
                          TensorDataset(PIXELS[:2], LABELS[:2])])  # fmt: skip
    for source in (both, DataLoader(both, batch_size=2)):
        images = open_images(source)
        order = images.items.flat() if images.batches else np.arange(5)
        assert images.labels.tolist() == [1, 0, 0, 0, 1] and len(order) == 5


def test_measurements_together_and_activations_on_disk(tmp_path):
    loader = DataLoader(Ready(), batch_size=8)
    found = vitprobe.measure_all(["cka", "skip_ratio"], net(), loader, device="cpu")
    assert {one.meta["batch_size"] for one in found.values()} == {8}
    folder = vitprobe.extract(net(), loader, layers="blocks.1", dtype="float32", out=tmp_path,
                              device="cpu")["net"]  # fmt: skip
    with torch.no_grad(), vitprobe.capture(net(), "blocks.1") as seen:
        seen._model(PIXELS)
    written = np.load(folder / "blocks.1.npy")
    np.testing.assert_allclose(written, seen["blocks.1"], rtol=1e-5, atol=1e-6)
    # The same loader, made anew, is the same images.
    images = [open_images(DataLoader(Ready(), batch_size=8)) for _ in range(2)]
    assert images[0].digest == images[1].digest
    assert images[0].digest != open_images(DataLoader(Ready(), batch_size=7)).digest


def test_a_function_and_a_module_of_one_name():
    assert callable(vitprobe.extract) and vitprobe.extract.extract is not None
    import vitprobe.extract as module

    assert vitprobe.extract is module


class Endless(IterableDataset):
    def __iter__(self):
        return iter(PIXELS)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Ready(), batch_size=8, shuffle=True), r"shuffles, .* give it shuffle=False"),
        (DataLoader(Ready(), shuffle=True, generator=torch.Generator()), "shuffles"),
        (DataLoader(Endless(), batch_size=8), "IterableDataset has no fixed order"),
        (DataLoader(Ready(), batch_size=None), "has no batches"),
        (DataLoader(Ready(), sampler=DistributedSampler(Ready(), 2, 0)), "DistributedSampler"),
        (DataLoader(TensorDataset(PIXELS[:0])), "no images in a DataLoader"),
        (DataLoader(TensorDataset(LABELS), batch_size=4), "no images: a list that begins"),
        (DataLoader(Ready(), batch_size=4, collate_fn=lambda items: torch.stack(
            [one for one, _ in items[:3]])), "3 images for 4 of its dataset"),
    ],
)  # fmt: skip
def test_what_is_no_order_of_images_gets_one_line(loader, message):
    before = torch.random.get_rng_state()
    with pytest.raises(VitprobeError, match=message):
        open_images(loader)
    assert torch.equal(before, torch.random.get_rng_state())


class Wandering(torch.utils.data.Sampler):
    """In another order each time, by no class that says so."""

    def __init__(self):
        self.turn = 0

    def __len__(self):
        return 22

    def __iter__(self):
        self.turn += 1
        return iter([*range(self.turn, 22), *range(self.turn)])


def test_an_order_that_changes_is_seen_not_guessed():
    with pytest.raises(VitprobeError, match="shuffles"):
        open_images(DataLoader(Ready(), batch_size=4, sampler=Wandering()))
    backwards = DataLoader(Ready(), batch_size=4, sampler=range(21, -1, -1))
    assert torch.equal(open_images(backwards).open(0), PIXELS[21])
