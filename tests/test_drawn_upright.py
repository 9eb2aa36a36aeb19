"""What is drawn of images has its first row on top, and panels side by side share their colours.

All measurements are drawn, and all results that are committed: a new one is tested from the day
it is added.
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vitprobe import load_result
from vitprobe.catalogue import measurements
from vitprobe.errors import NotApplicable
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.running.measurement import WeightsMeasurement

FIGURES = Path(__file__).parent.parent / "figures"
COMMITTED = [
    path for path in sorted(FIGURES.rglob("*.npz")) if path.stem not in {"training_curves"}
]
# Layers, channels or tokens along the axes: the first is at the bottom. All else is of an image.
MATRICES = {"cka", "neighbours", "skip_ablation", "skip_ratio"}
# Fields are drawn twice, as they are and as logarithms.
SCALES = {"receptive_field": 2}
# Each image by itself, from its least to its greatest: the map is of where, not of how much.
OF_THEIR_OWN = {"attention_rollout"}
FEW = {"linear_probe": {"shots": 2}, "receptive_field": {"num_images": 6}}


def check(result):
    scales, seen = set(), 0
    for ax in result.plot().axes:
        for image in ax.images:
            # Of "lower" the first row is at the bottom of an axis that is not turned round.
            top = ax.yaxis_inverted()
            where = f"{result.analysis}, {ax.get_title()!r}"
            assert top != (result.analysis in MATRICES), f"upside down: {where}"
            if image.get_array().ndim == 2:
                scales.add(image.get_clim())
                seen += 1
    if result.analysis not in OF_THEIR_OWN and seen:
        # Norms of each model have a colour bar of their own: its tokens have their own width.
        own = len(result.models) if result.analysis == "token_norms" else 1
        assert len(scales) == SCALES.get(result.analysis, own), (result.analysis, scales)


@pytest.mark.skipif(not COMMITTED, reason="the folder of figures is not here")
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_figures_are_upright_on_one_scale(path):
    check(load_result(path))


@pytest.fixture(scope="module")
def models():
    """Two models with attention and one without, whose values are of different sizes."""
    torch.manual_seed(0)
    found = []
    for scale in (1, 3):
        vit = timm.create_model("test_vit", img_size=32, num_classes=4)
        torch.nn.init.normal_(vit.pos_embed, std=scale)
        found.append(wrap(vit.eval(), f"vit {scale}"))
    cnn = timm.create_model("test_resnet", num_classes=4)
    return [*found, wrap(cnn.eval(), "cnn")]


@pytest.mark.parametrize("name", list(measurements()))
def test_every_measurement_is_drawn_upright_on_one_scale(name, models):
    pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = replace(open_images(pixels), labels=np.arange(24) % 2, classes=("a", "b"))
    module = import_module(f"vitprobe.{name}")
    drawn = 0
    for chosen in (models[::2], models[:2]):
        try:
            if issubclass(module.MEASUREMENT, WeightsMeasurement):
                result = module.measure(chosen)
            else:
                options = {"batch_size": 6, "device": "cpu", **FEW.get(name, {})}
                result = module.measure(chosen, images, **options)
        except NotApplicable:
            continue
        except Exception as error:
            assert name == "head_subsets", error
            continue
        check(result)
        drawn += 1
    assert drawn
