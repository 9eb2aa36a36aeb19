"""Claims about one network on what they must not find; see ``test_noise``."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace as Stub

import numpy as np
import pytest
import test_noise  # noqa: F401
import torch
from noise import DRAWS, LAYERS, TRIED, facts, holding, tries, verdicts

from vitprobe import localization as measured
from vitprobe import papers
from vitprobe.papers import darcet2024, dosovitskiy2021, oquab2023, park2022, park2023
from vitprobe.papers.raghu2021 import attention, fields, skips, tokens
from vitprobe.results.result import FAILS, HOLDS, OPEN
from vitprobe.statistics.patch_components import area_under_curve, components
from vitprobe.tracing.places import CLASS_TOKEN, CONVOLUTION, MEAN_OF_TOKENS


def mean_and_error(values):
    """Over the first axis."""
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


def test_every_claim_is_tried():
    made, root = set(), Path(papers.__file__).parent
    for file in root.rglob("*.py"):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        for function in ast.parse(file.read_text("utf-8")).body:
            calls = [one.func for one in ast.walk(function) if isinstance(one, ast.Call)]
            if any(isinstance(one, ast.Name) and one.id == "Finding" for one in calls):
                made.add(f"{module}.{function.name}")
    assert made and made == TRIED


def far(side):
    """(places, places) distances on a square grid."""
    y, x = np.indices((side, side)).reshape(2, -1)
    return np.hypot(y[:, None] - y, x[:, None] - x)


@tries("raghu2021.attention.distance")
@pytest.mark.parametrize(("reach", "above"), [(99, HOLDS), (1.5, FAILS)])
def test_heads_that_attend_to_places_of_chance(reach, above):
    """One place each time, of all or of those near; heads far and near at once there are none."""
    steps, rows = far(6), 2 * LAYERS
    for draw in range(DRAWS):
        generator = np.random.default_rng(draw)
        drawn = generator.random((12, rows, 4, 36, 36)) * (steps <= reach)
        pixels = steps[np.arange(36), drawn.argmax(-1)]
        value, error = mean_and_error(pixels.mean(-1))
        result = Stub(
            models=["a"], of=lambda m: np.arange(rows), distance_px=value, distance_se=error,
            uniform_px=np.full(rows, steps.mean()), meta={"n": 12, "global": [True]},
        )  # fmt: skip
        assert verdicts(attention.distance(result)) == [FAILS, above]


def of_fields(trends, errors, cut=False):
    """What two networks of six layers, the first with attention, are said to be."""
    owner = np.repeat([0, 1], LAYERS)
    result = Stub(
        models=["vit", "cnn"], rows_of=lambda m: np.flatnonzero(owner == m),
        trends=trends, trends_se=errors, reaching=lambda: np.full(2 * LAYERS, cut),
        meta={"attends": [True, False], "replicates": 48},
    )  # fmt: skip
    return fields.fields(result)


@tries("raghu2021.fields.fields")
def test_fields_of_one_width_in_which_no_place_stands_out():
    found = []
    for draw in range(DRAWS):
        # Areas of 0.3, nowhere a centre: as attention has it that is even, with and without skips.
        means = np.array([0.3, 0.3, 0.3, 0, 0])
        samples = means + np.random.default_rng(draw).normal(0, 0.1, (48, 2, 5))
        told = of_fields(*mean_and_error(samples))
        assert len(told) == 5
        found += verdicts(told)
    assert holding(found) <= 2


@tries("raghu2021.fields.fields")
@pytest.mark.parametrize(("more", "verdict"), [(0.05, FAILS), (0.3, HOLDS)])
def test_fields_that_are_hardly_wider(more, verdict):
    trends = np.array([[0.1 + more, 0.4, 0.4, 0, np.nan], [0.1, 0.1, 0.1 + more, 0, np.nan]])
    _, grows, farther = of_fields(trends, np.full((2, 5), 1e-4))
    assert (grows.verdict, farther.verdict) == (verdict, verdict)


@tries("raghu2021.skips.ablation")
@pytest.mark.parametrize(
    ("loss", "left", "most"), [(0, 0.1, 0), (0.05, 0.1, 0), (0.3, 0.7, 0), (0.3, 0.2, 3 * DRAWS)]
)
def test_blocks_without_which_layers_are_alike_still(loss, left, most):
    found = []
    for draw in range(DRAWS):
        samples = loss + np.random.default_rng(draw).normal(0, 0.04, (16, 3))
        result = Stub(
            models=["net"], block=np.array(["", "b.0", "b.1", "b.2"]), layers=np.full((4, 9), "a"),
            model_of_panel=np.zeros(4, int), means=np.full((4, 4), left),
            means_se=np.full((4, 4), 0.03),
            loss=np.insert(np.transpose(mean_and_error(samples)), 0, 0, axis=0),
            meta={"replicates": 16, "trained_without": False, "experiment": "removed"},
        )  # fmt: skip
        found += verdicts(skips.ablation(result))
    assert len(found) == 3 * DRAWS and holding(found) == most


@tries(*(f"raghu2021.tokens.{name}" for name in ("_peaks", "_less_localised", "_earlier_unit")))
def test_tokens_that_have_nothing_to_do_with_patches():
    found, owner = [], np.repeat([0, 1, 2], LAYERS)
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        values = torch.randn(8, 3 * LAYERS, 36, 36, generator=generator).double() / 5
        each = np.array([[measured.contrast(one) for one in part] for part in values])
        shares = np.array([[measured.peak_share(one, 6, 6) for one in part] for part in values])
        (contrast, contrast_se), (share, share_se) = mean_and_error(each), mean_and_error(shares)
        result = Stub(
            models=list("abc"), model_of_layer=owner, rows_of=lambda m: np.flatnonzero(owner == m),
            _last_layers=lambda: [5, 11, 17], layers=np.array(["layer"] * 18), contrast=contrast,
            contrast_se=contrast_se, peak_share=share, peak_share_se=share_se,
            meta={"replicates": 8, "kinds": [CLASS_TOKEN, MEAN_OF_TOKENS, CONVOLUTION]},
        )  # fmt: skip
        told = tokens.localization(result)
        assert len(told) == 4
        found += verdicts(told)
    assert holding(found) <= 1


def of_norms(patches, registers):
    """Of (images, layers, patches) norms and (images, layers, registers)."""
    share, share_se = mean_and_error((patches > 5 * np.median(patches)).mean(-1))
    norm, norm_se = (np.pad(one, ((0, 0), (1, 0))) for one in mean_and_error(registers))
    kinds = ["class"] + ["register"] * registers.shape[-1]
    result = Stub(
        models=["net"], rows_of=lambda m: np.arange(LAYERS), outlier_share=share,
        outlier_share_se=share_se, prefix_kind=np.array([kinds] * LAYERS), prefix_norm=norm,
        prefix_norm_se=norm_se, norm_p99=np.percentile(patches, 99, axis=(0, 2)),
        meta={"models": facts("net"), "attends": [True], "tokens": [True], "times": 5, "n": 24,
              "replicates": 24},
    )  # fmt: skip
    return verdicts(darcet2024.findings(result))


@tries("darcet2024._with_registers", "darcet2024._without_registers")
def test_tokens_of_like_norms():
    """Patches of one law and registers of the same, in vectors short and long."""
    for draw in range(DRAWS):
        for width in (2, 8, 768):
            generator = np.random.default_rng(draw)
            norms = np.sqrt(generator.chisquare(width, (24, LAYERS, 104)))
            patches, registers = norms[..., :100], norms[..., 100:]
            # One patch in a thousand stands out, as some do by chance.
            some = np.where(generator.random(patches.shape) < 0.001, 10 * patches, patches)
            assert of_norms(some, registers[..., :0]) == [FAILS]
            assert of_norms(patches, registers) == [FAILS]
            assert of_norms(patches, 1.1 * registers) == [FAILS]
        many = np.where(generator.random(patches.shape) < 0.03, 10 * patches, patches)
        many[:, :2] = patches[:, :2]
        assert of_norms(many, registers[..., :0]) == [HOLDS]
        assert of_norms(patches, 3 * registers) == [HOLDS]


def tables(draw, *weights):
    """Similarities of positions whose places mean nothing, of networks with these weights."""
    table = np.random.default_rng(draw).normal(size=(len(weights), 36, 48))
    table /= np.linalg.norm(table, axis=2, keepdims=True)
    alike = (table @ table.transpose(0, 2, 1)).reshape(-1, 6, 6, 6, 6)
    models = [{"name": f"net{m}", "weights": one} for m, one in enumerate(weights)]
    about = [{"grid": [6, 6], "label": one["name"], "model": m} for m, one in enumerate(models)]
    return Stub(
        models=[one["name"] for one in models], of=lambda t: alike[t],
        meta={"models": models, "tables": about},
    )  # fmt: skip


@tries("dosovitskiy2021.position_embedding")
def test_positions_that_mean_nothing_have_no_structure():
    for draw in range(DRAWS):
        told = dosovitskiy2021.position_embedding(tables(draw, "trained", "random (seed 0)"))
        assert len(told) == 5 and HOLDS not in verdicts(told)


@tries("dosovitskiy2021.patch_embedding")
def test_filters_that_are_smooth_and_such_that_are_not():
    for draw in range(DRAWS):
        noise = np.random.default_rng(draw).normal(size=(4, 8, 8, 3))
        smooth = noise.cumsum(1).cumsum(2)
        for tiles, of_trained, of_random in ((noise, FAILS, HOLDS), (smooth, HOLDS, FAILS)):
            result = Stub(
                of=lambda m: tiles,  # noqa: B023
                meta={"models": facts("a") + facts("b", weights="random (seed 0)")},
            )
            assert verdicts(dosovitskiy2021.patch_embedding(result)) == [of_trained, of_random]


def blobs(generator, images, side, width):
    """(images, side, side, width) fields that vary smoothly."""
    y = np.arange(side)
    near = np.exp(-np.square(y[:, None] - y) / 8)
    noise = generator.normal(size=(images, side, side, width))
    return np.einsum("ay,bx,nyxw->nabw", near, near, noise)


@tries("oquab2023.findings")
def test_components_that_have_nothing_to_do_with_objects():
    found = []
    for draw in range(DRAWS):
        generator = np.random.default_rng(draw)
        patches = blobs(generator, 16, 8, 5).reshape(-1, 5)
        truth = (blobs(generator, 16, 8, 1) > 3).reshape(16, -1)
        first = components(patches)[0][:, 0].reshape(16, -1)
        auc, error = area_under_curve(first, truth)
        result = Stub(
            models=["net"], auc=[auc], auc_se=[error], layers=["last"],
            meta={"models": facts("net"), "n": 16},
        )  # fmt: skip
        found += verdicts(oquab2023.findings(result))
    assert len(found) == DRAWS and holding(found) == 0
    # As random CNNs reach on digit scenes: their filters see edges.
    result.auc, result.auc_se = [0.9], [0.025]
    assert verdicts(oquab2023.findings(result)) == [OPEN]


@tries("park2022._claim")
@pytest.mark.parametrize(("change", "verdict"), [(0.01, FAILS), (0.3, HOLDS)])
def test_small_changes_that_are_sure_smooth_nothing(change, verdict):
    """What sublayers of random weights do is small, and the same for every image."""
    signs = np.array([[-change, change, change]])
    result = Stub(
        models=["net"], names={"step": ("attention", "MLP", "convolution")}, step_delta=signs,
        step_delta_se=np.full((1, 3), 1e-4), step_variance=signs,
        step_variance_se=np.full((1, 3), 1e-4), rows_of=lambda m: np.arange(3),
        kind=np.array(["attention", "MLP", "convolution"]), meta={"models": facts("net"), "n": 99},
    )  # fmt: skip
    assert verdicts(park2022.findings(result)) == [verdict] * 3


@tries("park2023._falls", "park2023._below")
@pytest.mark.parametrize(("late", "verdict"), [(0.48, FAILS), (0.1, HOLDS)])
def test_heads_of_nearly_the_same_information_have_not_collapsed(late, verdict):
    names = [("one", "vit.dino"), ("other", "vit.mae")]
    result = Stub(
        models=[name for name, _ in names], nmi=np.array([0.5, 0.5, late, 0.5, 0.5, 0.5])[:, None],
        nmi_se=np.full((6, 1), 1e-4), rows_of=lambda m: np.arange(3 * m, 3 * m + 3),
        meta={"n": 99, "models": [{**one, "timm_name": tag}
                                  for one, (_, tag) in zip(facts("one", "other"), names)]},
    )  # fmt: skip
    assert verdicts(park2023.findings(result)) == [verdict] * 2
