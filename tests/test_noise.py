"""No verdict on noise: each claim on twenty draws of what it must not find.

A claim with an error of its own holds by chance about once in forty times; one about what random
weights have as surely as trained ones, only less of it, asks for more than they have. Here are
claims that compare networks; ``test_noise_alone.py`` has those about one, and sees that none is
left out. ``analyses/claims_on_noise.py`` tries all claims on random networks.
"""

from __future__ import annotations

from types import SimpleNamespace as Stub

import numpy as np
import pytest
import torch
from noise import DRAWS, LAYERS, facts, holding, tries, verdicts
from scipy.stats import spearmanr

from vitprobe.papers import groeger2026, huh2024, naseer2021
from vitprobe.papers.raghu2021 import alike, attention, same_depth, skips, tokens
from vitprobe.results import chance
from vitprobe.results.result import FAILS, HOLDS, OPEN
from vitprobe.statistics.hsic import gram, hsic, jackknife, normalise
from vitprobe.statistics.neighbours import nearest, overlap, permuted_overlap
from vitprobe.statistics.permuted_hsic import normalise_by, permuted_hsic
from vitprobe.tracing.places import CLASS_TOKEN, CONVOLUTION, MEAN_OF_TOKENS


def grams(draw, models=3, images=40, batches=5):
    """(batches, layers, n, n) Grams of layers that share nothing."""
    generator = torch.Generator().manual_seed(draw)
    features = torch.randn(models * LAYERS, images, 8, generator=generator)
    parts = features.split(images // batches, 1)
    return torch.stack([torch.stack([gram(x) for x in part]) for part in parts])


def unrelated(draw):
    """(batches, layers, layers) sums of HSIC₁ of layers that share nothing."""
    return torch.stack([hsic(part) for part in grams(draw)])


@tries("raghu2021.alike.findings", "raghu2021.same_depth.findings")
def test_unrelated_layers_meet_no_claim_of_a_comparison():
    owner, stages = np.repeat(np.arange(3), LAYERS), [(8, 8)] * 3 + [(4, 4)] * 3
    found = []
    for draw in range(DRAWS):
        sums, used = unrelated(draw), torch.ones(5)
        pairs = alike.statistics(
            list("abc"), owner, [True, False, False], [stages] * 3, {"hsic": sums, "used": used}
        )
        told = alike.findings(pairs, 5)
        assert len(told) == 4
        result = Stub(
            models=list("abc"), rows_of=lambda m: np.flatnonzero(owner == m),
            meta={"replicates": 5, "same_depth": same_depth.summaries([[0, 2], [1, 2]], owner,
                                                                      sums, used)},
        )  # fmt: skip
        told += same_depth.findings(result)
        assert len(told) == 7
        found += [one.verdict for one in told]
    assert holding(found) <= 2


@pytest.mark.parametrize(("change", "verdict"), [(0.02, FAILS), (0.08, HOLDS)])
def test_small_differences_of_cka_that_are_sure(change, verdict):
    """Layers of random weights are less alike in one third, or in one stage, by a hundredth."""
    sure = {"vit": (0.9, 1e-4), "cnn": (0.5, 1e-4), "spread": (0.4, 1e-4), "match_depth": (0, 1e-4)}
    pair = {"attention": "a", "convolution": "b", **sure}
    told = alike.findings([{**pair, "stages": (change, 1e-4), "late": (change, 1e-4)}], 9)
    assert verdicts(told) == [verdict] * 2


@tries("groeger2026.findings")
def test_unrelated_layers_are_not_more_alike_than_by_chance():
    found, owner = [], np.repeat(np.arange(3), LAYERS)
    for draw in range(DRAWS):
        parts = grams(draw)
        sums = torch.stack([hsic(part) for part in parts])
        value, error = jackknife(normalise, sums, torch.ones(len(parts)))
        null = sum(permuted_hsic(part, 100, [draw, b]) for b, part in enumerate(parts))
        each, largest = chance.quantiles(normalise_by(null, sums.sum(0)).numpy(), owner)
        result = Stub(
            models=list("abc"), rows_of=lambda m: np.flatnonzero(owner == m), cka=value,
            cka_se=error, null_q95=each, null_max_q95=largest,
            meta={"models": facts(*"abc"), "null": 100, "replicates": len(parts)},
        )  # fmt: skip
        found += verdicts(groeger2026.findings(result))
    assert len(found) == 3 * DRAWS and holding(found) <= 1


@tries("huh2024._above_chance")
def test_unrelated_images_have_no_common_neighbours():
    found = []
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        both = torch.randn(2 * LAYERS, 60, 5, generator=generator)
        near = torch.stack([nearest(one, 6)[0] for one in both])
        owner = np.repeat([0, 1], LAYERS)
        value, error = overlap(near)
        null, largest = chance.quantiles(
            np.array(list(permuted_overlap(near, 60, draw)), np.float32), owner
        )
        result = Stub(
            models=["a", "b"], rows_of=lambda m: np.flatnonzero(owner == m),  # noqa: B023
            alignment=value, alignment_se=error, null_q95=null, null_max_q95=largest,
            chance=6 / 59, readout=np.array(["mean of places"] * 2 * LAYERS),
            meta={"models": facts("a", "b"), "n": 60},
        )  # fmt: skip
        found += [one.verdict for one in huh2024.findings(result)]
    assert len(found) == DRAWS and holding(found) <= 1


@tries("huh2024._late")
def test_labels_that_mean_nothing_are_not_found_late():
    found = []
    for draw in range(10 * DRAWS):
        accuracy = np.random.default_rng(draw).binomial(200, 0.1, LAYERS) / 200
        result = Stub(
            models=["a"], rows_of=lambda m: np.arange(LAYERS),
            readout=np.array(["class token"] * LAYERS), accuracy=accuracy,
            accuracy_se=np.sqrt(accuracy * (1 - accuracy) / 200),
            meta={"models": facts("a"), "n": 200},
        )  # fmt: skip
        found += verdicts(huh2024.findings(result))
    assert len(found) == 10 * DRAWS and holding(found) <= 8


@tries(*(f"raghu2021.tokens.{name}" for name in ("_tokens_apart", "_own_is_best", "_late")))
def test_labels_that_mean_nothing_have_no_readout_that_is_best():
    names, found = np.array(["tokens", "CLS", "first patch", "mean", "all"]), []
    for draw in range(DRAWS):
        generator = np.random.default_rng(draw)
        each = generator.binomial(200, 0.1, (3, 3 * LAYERS, 5)) / 200
        mean = each.mean(0)
        result = Stub(
            models=["a", "b", "c"], layers=np.array([f"layer {i}" for i in range(3 * LAYERS)]),
            model_of_layer=np.repeat([0, 1, 2], LAYERS), readouts=names, accuracy=mean,
            accuracy_se=np.sqrt(mean * (1 - mean) / 200), accuracy_of_draw=each,
            rows_of=lambda m: np.arange(m * LAYERS, (m + 1) * LAYERS),
            meta={"kinds": [CLASS_TOKEN, MEAN_OF_TOKENS, CONVOLUTION], "n": 200},
        )  # fmt: skip
        told = tokens.linear_probe(result)
        assert len(told) == 5
        found += [one.verdict for one in told]
    assert holding(found) <= 2


@tries("naseer2021._keeps_more")
@pytest.mark.parametrize(("gap", "verdict"), [(0.02, FAILS), (0.04, OPEN), (0.3, HOLDS)])
def test_networks_that_keep_nearly_the_same_predictions(gap, verdict):
    result = Stub(
        models=["vit", "cnn"], dropped=np.array([0, 0.5, 0]), shuffle=np.array([1, 1, 4]),
        agreement=np.array([[1, 0.5 + gap, 0.5 + gap], [1, 0.5, 0.5]]),
        agreement_se=np.full((2, 3), 0.005),
        meta={"models": facts("vit", "cnn"), "attends": [True, False], "n": 999},
    )  # fmt: skip
    assert verdicts(naseer2021.findings(result)) == [verdict] * 2
    # Who predicts one class throughout keeps it.
    result.meta["commonest"] = [0.1, 0.9]
    told = naseer2021.findings(result)
    assert verdicts(told) == [OPEN] * 2
    assert all("cnn predicts one class for 90% of the images" in one.numbers for one in told)


@tries("raghu2021.skips.ratio")
@pytest.mark.parametrize(("ratio", "verdict"), [(0.02, FAILS), (0.5, HOLDS)])
def test_ratios_that_hardly_differ(ratio, verdict):
    result = Stub(
        models=["vit", "cnn"], of=lambda m: [0, 1], class_token=lambda m: None if m else 0,
        log_ratio=np.array([[ratio, -ratio, ratio], [np.nan, np.nan, 0]]),
        log_ratio_se=np.full((2, 3), 1e-3),
        meta={"layouts": [{"attends": True}, {"attends": False}], "n": 99},
    )  # fmt: skip
    assert verdicts(skips.ratio(result)) == [verdict] * 2


@tries("raghu2021.attention.head_subsets")
def test_heads_in_an_order_of_chance():
    """However many images have shown the order, and however many heads there are."""
    found = []
    for draw in range(DRAWS):
        generator = np.random.default_rng(draw)
        for heads in (3, 4, 6, 12):
            width = max(1, heads // 4)
            subsets = np.arange(heads - width + 1)[:, None] + np.arange(width)
            distance, alike = (
                one[subsets].mean(1) for one in (np.arange(heads), generator.random(heads))
            )
            result = Stub(
                layers=["layer"], distance_px=distance, heads=subsets,
                rho=[spearmanr(alike, distance).statistic], rho_se=[1e-6],
                meta={"models": facts("vit", "cnn"), "replicates": 30},
            )  # fmt: skip
            found += verdicts(attention.head_subsets(result))
            result.rho = [-1.0]
            assert verdicts(attention.head_subsets(result)) == [OPEN if heads < 4 else HOLDS]
    assert len(found) == 4 * DRAWS and holding(found) <= 4
