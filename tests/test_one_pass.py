"""Measurements of later papers: alone or in one pass, stopped and resumed, in two processes."""

from __future__ import annotations

import signal
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from two_processes import results_of

from vitprobe.models.loading import wrap
from vitprobe.running.interrupts import Interrupted
from vitprobe.running.loading import TransformedImages
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_each, measure_one

NAMES = ("token_norms", "attention_statistics", "frequency", "neighbours", "patch_pca", "occlusion")
MODELS, SIZE, COUNT = ("vit", "cnn"), 32, 18


def models():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, depth=2, num_heads=2, embed_dim=16,
        num_classes=4, reg_tokens=2,
    )  # fmt: skip
    cnn = timm.create_model("resnet10t", num_classes=4)
    return [wrap(module.eval(), name) for module, name in zip((vit, cnn), MODELS)]


def images():
    return torch.randn(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def options(**more):
    return Options(batch_size=4, device="cpu", **more)


def measurements():
    return {name: import_module(f"vitprobe.{name}").MEASUREMENT() for name in NAMES}


def check_same(one, other):
    assert one.arrays().keys() == other.arrays().keys()
    for name, array in one.arrays().items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(array, other.arrays()[name], rtol=1e-6, atol=1e-9)
        else:
            np.testing.assert_array_equal(array, other.arrays()[name])


def all_at_once():
    return measure_each(measurements(), models(), images(), options())


@pytest.fixture(scope="module")
def together():
    return all_at_once()


@pytest.mark.parametrize("name", NAMES)
def test_alone_a_measurement_gives_what_it_gives_with_others(together, name):
    result = together[name]
    chosen = [m for m in models() if m.name in result.models]
    check_same(measure_one(measurements()[name], chosen, images(), options()), result)


def test_stopped_and_resumed_the_numbers_are_the_same(together, tmp_path, monkeypatch):
    read = TransformedImages.__getitem__

    def stops(self, position):
        if position == 9:
            signal.raise_signal(signal.SIGINT)
        return read(self, position)

    kept = options(checkpoint=tmp_path / "state", save_every=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(TransformedImages, "__getitem__", stops)
        with pytest.raises(Interrupted, match="batch 2 of 5"):
            measure_each(measurements(), models(), images(), kept)
    assert list(tmp_path.glob("*.partial"))
    for name, result in measure_each(measurements(), models(), images(), kept).items():
        check_same(result, together[name])


def test_two_processes_give_the_numbers_of_one(together, tmp_path):
    results = results_of("test_one_pass", "all_at_once()", tmp_path)
    assert set(results) == set(together)
    for name, result in together.items():
        check_same(results[name], result)
