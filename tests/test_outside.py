"""The package's numbers against other people's: libraries that are installed, tables in print.

dcor, rsatoolbox, repsim and ckatorch come with the extra ``[interop]``; each part runs where its
library is there. ``analyses/against_others.py`` prints the comparison.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torchvision
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV

from vitprobe.patch_embedding import principal_components
from vitprobe.statistics.hsic import biased_cka, cka, gram, hsic, normalise
from vitprobe.statistics.ridge import PENALTIES, ridge
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.observing import observing
from vitprobe.tracing.reaches import put_reach, reach_of
from vitprobe.tracing.theoretical_field import _pixels, _Reaching


@pytest.fixture(autouse=True)
def threads():
    """Compilers of the libraries below change how many threads the process has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pair(n=100):
    """The pair of METHODS' published values, as arrays."""
    state = np.random.RandomState(1337)
    x = state.randn(n, 10)
    return x, state.randn(n, 10) + x


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.filterwarnings("ignore:Distance covariance")
def test_debiased_cka_is_the_unbiased_distance_correlation_of_exponent_2():
    dcor = pytest.importorskip("dcor")
    x, y = pair()
    expected = dcor.u_distance_correlation_sqr(x, y, exponent=2)
    assert cka(*tensors(x, y)) == pytest.approx(float(expected), abs=1e-12)


def test_biased_cka_is_the_whitened_cosine_of_distances():
    rsatoolbox = pytest.importorskip("rsatoolbox")
    dataset, calc = rsatoolbox.data.Dataset, rsatoolbox.rdm.calc_rdm
    x, y = pair()
    rdms = [calc(dataset(one), method="euclidean") for one in (x, y)]
    expected = rsatoolbox.rdm.compare(*rdms, "cosine_cov").item()
    assert biased_cka(*tensors(x, y)) == pytest.approx(expected, abs=1e-10)


def test_unbiased_hsic():
    repsim = pytest.importorskip("repsim")
    x, y = pair()
    found = hsic(torch.stack([gram(one) for one in tensors(x, y)]))
    np.testing.assert_allclose(found, repsim.hsic([x, y], "linear", "song"), rtol=1e-12)


def test_minibatch_cka():
    ckatorch = pytest.importorskip("ckatorch")
    x, y = (one.view(4, 25, 10) for one in tensors(*pair()))
    sums = sum(hsic(torch.stack([gram(a), gram(b)])) for a, b in zip(x, y))
    assert float(normalise(sums)[0, 1]) == pytest.approx(float(ckatorch.cka_batch(x, y)), abs=1e-12)


def rows_and_targets(n=40, d=12, classes=3):
    state = np.random.RandomState(0)
    labels = np.arange(n) % classes
    rows = state.randn(n, d) + labels[:, None]
    rows = (rows - rows.mean(0)) / rows.std(0)
    return rows, 2.0 * np.eye(classes)[labels] - 1


@pytest.mark.parametrize("penalty", [0.1, 10.0, 1000.0])
def test_probes_are_scikit_learns_ridge(penalty):
    rows, targets = rows_and_targets()
    # Ours penalise a constant feature like any other; scikit-learn's has none of its own here.
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    expected = Ridge(penalty, fit_intercept=False).fit(rows, targets).coef_.T
    for form in ("primal", "dual"):
        found, _ = ridge(*tensors(rows, targets), torch.tensor([penalty]).double(), form)
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("features", [5, 12, 60])
def test_penalties_are_those_that_scikit_learn_takes(features):
    rows, targets = rows_and_targets(d=features)
    expected = RidgeCV(PENALTIES.numpy()).fit(rows, targets).alpha_
    with_constant = np.hstack([rows, np.ones((len(rows), 1))])
    assert float(ridge(*tensors(with_constant, targets))[1]) == expected


def test_components_are_scikit_learns():
    filters = np.random.RandomState(0).randn(30, 3 * 4 * 4)
    found, shares = principal_components(filters, 28)
    expected = PCA(28).fit(filters)
    np.testing.assert_allclose(shares, expected.explained_variance_ratio_, atol=1e-12)
    products = (found.reshape(28, -1) * expected.components_).sum(1)
    np.testing.assert_allclose(abs(products), 1, atol=1e-9)


SMALL = {
    "test_vit": {"img_size": 64},
    "test_maxvit": {"img_size": 64},
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 12, "window_size": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_layers_put_out_what_timms_loop_gives(name):
    torch.manual_seed(0)
    options = SMALL[name]
    module = timm.create_model(name, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    found = map_layers(name, module, images)
    taken = []
    layers = found.choose("all")
    with torch.no_grad():
        with capture(module, layers, lambda i, tensor: taken.append(tensor.clone())):
            module(images)
        theirs = module.forward_intermediates(images, norm=False, intermediates_only=True)
    # What timm takes behind the last activation of a stem is no layer of ours.
    theirs = theirs[name in ("test_maxvit", "test_resnet") :]
    assert theirs
    for one in theirs:
        assert any(same_map(one, tensor) for tensor in taken), (name, one.shape)


def same_map(theirs, ours):
    """Whether a map (n, C, H, W) is what a layer put out, whatever its layout and class tokens."""
    n, channels, rows, columns = theirs.shape
    if ours.ndim == 3 and ours.shape[2] == channels and ours.shape[1] >= rows * columns:
        ours = ours[:, -rows * columns :].mT.reshape(theirs.shape)
    elif ours.shape == (n, rows, columns, channels):
        ours = ours.permute(0, 3, 1, 2)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


# Size, stride and padding of receptive fields: google-research/receptive_field,
# receptive_field/RECEPTIVE_FIELD_TABLE.md at commit cfbfe6b (Araujo, Norris and Sim 2019, Distill).
# Networks are those of TF-Slim without a fixed resolution, and MobileNet at 321 px: there what
# TensorFlow pads is the same on both sides, as it is here at any size.
VGG_16 = """
0 3 1 1 | 4 6 2 2 | 5 10 2 4 | 9 16 4 6 | 10 24 4 10 | 12 32 4 14 | 16 44 8 18 | 17 60 8 26
19 76 8 34 | 23 100 16 42 | 24 132 16 58 | 26 164 16 74 | 30 212 32 90
"""
INCEPTION_V3 = """
Conv2d_1a_3x3 3 2 0 | Conv2d_2a_3x3 7 2 0 | Conv2d_2b_3x3 11 2 2 | Pool1 15 4 2
Conv2d_3b_1x1 15 4 2 | Conv2d_4a_3x3 23 4 2 | Pool2 31 8 2 | Mixed_5b 63 8 18 | Mixed_5c 95 8 34
Mixed_5d 127 8 50 | Mixed_6a 159 16 58 | Mixed_6b 351 16 154 | Mixed_6c 543 16 250
Mixed_6d 735 16 346 | Mixed_6e 927 16 442 | Mixed_7a 1055 32 490 | Mixed_7b 1183 32 554
Mixed_7c 1311 32 618
"""
INCEPTION_V4 = """
features.0 3 2 0 | features.1 7 2 0 | features.2 11 2 2 | features.3 15 4 2 | features.4 47 4 14
features.5 55 8 14 | features.6 87 8 30 | features.7 119 8 46 | features.8 151 8 62
features.9 183 8 78 | features.10 215 16 86 | features.11 407 16 182 | features.12 599 16 278
features.13 791 16 374 | features.14 983 16 470 | features.15 1175 16 566
features.16 1367 16 662 | features.17 1559 16 758 | features.18 1687 32 806
features.19 1815 32 870 | features.20 1943 32 934 | features.21 2071 32 998
"""
INCEPTION_RESNET_V2 = """
conv2d_1a 3 2 0 | conv2d_2a 7 2 0 | conv2d_2b 11 2 2 | maxpool_3a 15 4 2 | conv2d_3b 15 4 2
conv2d_4a 23 4 2 | maxpool_5a 31 8 2 | mixed_5b 63 8 18 | mixed_6a 415 16 186
repeat_1 2335 16 1146 | mixed_7a 2399 32 1162 | conv2d_7b 3039 32 1482
"""
MOBILENET_V1 = """
conv_stem 3 2 1 | blocks.0.0 7 2 3 | blocks.1.0 11 4 5 | blocks.1.1 19 4 9 | blocks.2.0 27 8 13
blocks.2.1 43 8 21 | blocks.3.0 59 16 29 | blocks.3.1 91 16 45 | blocks.3.2 123 16 61
blocks.3.3 155 16 77 | blocks.3.4 187 16 93 | blocks.3.5 219 16 109 | blocks.4.0 251 32 125
blocks.4.1 315 32 157
"""
PUBLISHED = {
    "vgg16": (lambda: torchvision.models.vgg16().features, VGG_16),
    **{
        name: (lambda name=name: timm.create_model(name), table)
        for name, table in (
            ("inception_v3", INCEPTION_V3),
            ("inception_v4", INCEPTION_V4),
            ("inception_resnet_v2", INCEPTION_RESNET_V2),
            ("mobilenetv1_100", MOBILENET_V1),
        )
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_strides_and_paddings_of_receptive_fields(name):
    make, table = PUBLISHED[name]
    # Memory of the right shape will do: fields do not hang on values.
    with torch.device("meta"):
        module = make().eval()
    module = module.to_empty(device="cpu")
    side, found = 128, {}

    def keep(part):
        def hook(_, given, out):
            reach = reach_of(out)
            if reach is None or getattr(out, "ndim", 0) != 4:
                return
            # First and last row that each row of the map can depend on.
            found[part] = [(sign * bound.amax((0, 1, 3))).tolist()
                           for sign, bound in zip((-1, 1), reach)]  # fmt: skip

        return hook

    for part, child in module.named_modules():
        child.register_forward_hook(keep(part))
    inputs = torch.zeros(1, 3, side, side)
    put_reach(inputs, _pixels(inputs))
    with torch.no_grad(), observing(module, _Reaching((side, side))):
        module(inputs)
    rows = [row.split() for line in table.strip().splitlines() for row in line.split("|")]
    assert len(rows) > 10
    for part, *numbers in rows:
        size, stride, padding = map(int, numbers)
        starts = [stride * row - padding for row in range(len(found[part][0]))]
        # The image ends what would look beyond it, or strides that leave out its last rows.
        end = found[part][1][-1]
        first = [max(0, start) for start in starts]
        last = [min(end, start + size - 1) for start in starts]
        assert found[part] == [first, last], part
