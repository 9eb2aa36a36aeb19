"""No verdict on noise: each claim on twenty draws of what it must not find.

A claim with an error of its own holds by chance about once in forty times; one about what random
weights have as surely as trained ones, only less of it, asks for more than they have.
``analyses/claims_on_noise.py`` tries all claims on random networks.
"""

from __future__ import annotations

from types import SimpleNamespace as Stub

import numpy as np
import pytest
import torch

from vitprobe.papers import huh2024, naseer2021, park2022, park2023
from vitprobe.papers.raghu2021 import alike, same_depth, skips, tokens
from vitprobe.results import chance
from vitprobe.results.result import FAILS, HOLDS, OPEN
from vitprobe.statistics.hsic import gram, hsic
from vitprobe.statistics.neighbours import nearest, overlap, permuted_overlap
from vitprobe.tracing.places import CLASS_TOKEN, CONVOLUTION, MEAN_OF_TOKENS

DRAWS, LAYERS = 20, 6


def holding(verdicts):
    """How many of all draws' verdicts are that a claim holds."""
    return sum(one == HOLDS for one in verdicts)


def facts(*names, weights="trained"):
    return [{"name": name, "weights": weights} for name in names]


def unrelated(draw, models=3, images=40, batches=5):
    """(groups, layers, layers) sums of HSIC₁ of layers that share nothing."""
    generator = torch.Generator().manual_seed(draw)
    features = torch.randn(models * LAYERS, images, 8, generator=generator)
    parts = features.split(images // batches, 1)
    return torch.stack([hsic(torch.stack([gram(x) for x in part])) for part in parts])


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


def verdicts(findings):
    return [one.verdict for one in findings]


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


@pytest.mark.parametrize(("ratio", "verdict"), [(0.02, FAILS), (0.5, HOLDS)])
def test_ratios_that_hardly_differ(ratio, verdict):
    result = Stub(
        models=["vit", "cnn"], of=lambda m: [0, 1], class_token=lambda m: None if m else 0,
        log_ratio=np.array([[ratio, -ratio, ratio], [np.nan, np.nan, 0]]),
        log_ratio_se=np.full((2, 3), 1e-3),
        meta={"layouts": [{"attends": True}, {"attends": False}], "n": 99},
    )  # fmt: skip
    assert verdicts(skips.ratio(result)) == [verdict] * 2
