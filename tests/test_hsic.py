"""Grams, U-centring and CKA against closed forms, slow references and published values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.statistics.hsic import (
    biased_cka,
    bootstrap_error,
    centre,
    cka,
    gram,
    hsic,
    jackknife,
    normalise,
    u_centre,
)
from vitprobe.statistics.place_hsic import place_grams


def slow_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012's estimator, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    trace = np.trace(k @ m)
    totals = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (ones @ k @ m @ ones)
    return (trace + totals - cross) / (n * (n - 3))


def reference_pair():
    state = np.random.RandomState(1337)
    x = state.randn(100, 10)
    y = state.randn(100, 10) + x
    return torch.from_numpy(x), torch.from_numpy(y)


def minibatches(x, y, size):
    return sum(hsic(torch.stack([gram(a), gram(b)])) for a, b in zip(x.split(size), y.split(size)))


def test_published_values():
    x, y = reference_pair()
    assert biased_cka(x, y) == pytest.approx(0.5576133, abs=1e-7)
    assert cka(x, y) == pytest.approx(0.5134565, abs=1e-7)
    assert float(hsic(torch.stack([gram(x), gram(y)]))[0, 1]) == pytest.approx(9.8959558, abs=1e-7)
    assert float(normalise(minibatches(x, y, 25))[0, 1]) == pytest.approx(0.5132675, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 12), p=st.integers(1, 30), q=st.integers(1, 30), seed=st.integers(0, 99))
def test_hsic_equals_its_definition(n, p, q, seed):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, p)), generator.normal(size=(n, q))
    found = hsic(torch.stack([gram(torch.from_numpy(x)), gram(torch.from_numpy(y))]))
    assert float(found[0, 1]) == pytest.approx(slow_hsic(x @ x.T, y @ y.T), rel=1e-8, abs=1e-8)
    assert float(found[0, 0]) == pytest.approx(slow_hsic(x @ x.T, x @ x.T), rel=1e-8, abs=1e-8)


def test_u_centred_grams_have_zero_rows_and_diagonal():
    centred = u_centre(gram(torch.randn(9, 20, dtype=torch.float64))[None])[0]
    assert centred.sum(0).abs().max() < 1e-12
    assert centred.diagonal().abs().max() == 0


def test_scalar_features_of_four_examples_by_hand():
    # x = (0, 0, 0, 2): off the diagonal K = 0, so every term of the estimator vanishes. Centring
    # first adds c_i + c_j, which must change nothing.
    x = torch.tensor([[0.0], [0.0], [0.0], [2.0]], dtype=torch.float64)
    assert float(hsic(gram(x)[None])[0, 0]) == pytest.approx(0, abs=1e-15)
    # x = (1, 1, -1, -1): K off the diagonal is 1 within a pair and -1 across. tr(K²) = 12,
    # 1ᵀK1 = -4, 1ᵀK²1 = 4, so HSIC₁ = (12 + 16/6 - 2/2·4) / 4 = 8/3.
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    assert float(hsic(gram(x)[None])[0, 0]) == pytest.approx(8 / 3)


def test_invariant_to_rotation_and_scale_but_not_to_any_invertible_map():
    x, y = reference_pair()
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    assert cka(3 * x @ rotation, y) == pytest.approx(cka(x, y), abs=1e-12)
    stretch = torch.diag(torch.logspace(-2, 2, 10, dtype=torch.float64))
    assert abs(cka(x @ stretch, y) - cka(x, y)) > 0.05


def test_independent_data_average_zero_and_negative_values_are_kept():
    generator = torch.Generator().manual_seed(0)
    values = [
        cka(*torch.randn(2, 30, 50, generator=generator, dtype=torch.float64)) for _ in range(200)
    ]
    assert min(values) < 0
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_means_far_above_the_deviation_keep_their_digits_in_float32(offset):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3000, generator=generator)
    y = x[:, :1500] + torch.randn(32, 1500, generator=generator)
    # The shift itself rounds the features, so the reference starts from the rounded ones.
    shifted = x + offset
    assert cka(shifted, y) == pytest.approx(cka(shifted.double(), y.double()), abs=2e-6)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 40_000])
def test_blocks_cover_every_feature_once(size):
    x = torch.randn(6, size, generator=torch.Generator().manual_seed(1))
    centred = (x - x.mean(0)).double()
    torch.testing.assert_close(centre(gram(x)), centred @ centred.T, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_not_multiplied_in_half_precision(dtype):
    # Squares of 300 overflow float16 (65,504).
    x = (300 * torch.randn(8, 4000, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = x.double() @ x.double().T
    torch.testing.assert_close(gram(x), exact, rtol=1e-4, atol=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gram(x), exact, rtol=1e-4, atol=1.0)


def test_memory_order_does_not_matter():
    x = torch.randn(5, 6, 7, 8, dtype=torch.float64)
    for other in (
        x.to(memory_format=torch.channels_last),
        x.permute(0, 2, 3, 1),
        x.permute(0, 3, 1, 2)[:, ::2],
    ):
        torch.testing.assert_close(gram(other), gram(other.clone().contiguous()))


def test_features_that_do_not_vary_are_undefined_not_zero():
    x = torch.randn(16, 10)
    # 0.1 has no exact binary form, so that its batch mean may differ from it in the last bit.
    for dead in (torch.zeros(16, 300), torch.full((16, 3000), 0.1), torch.full((16, 7), 1e20)):
        assert gram(dead).abs().max() == 0
        assert np.isnan(cka(x, dead))
    # Zeros come before what does not vary, in a piece of their own.
    dead = torch.cat([torch.zeros(16, 2**16), torch.full((16, 2**16), 0.1)], 1)
    assert gram(dead).abs().max() == 0
    assert cka(x, x) == pytest.approx(1)


def varying(n=16, features=40, scale=1.0):
    return scale * torch.randn(n, features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("constant", [1, 40, 4000])
def test_constant_features_beside_small_ones_hide_nothing(constant):
    x = varying(scale=1e-3)
    y = x + varying(features=40, scale=1e-3).flip(1)
    beside = torch.cat([torch.full((16, constant), 1e4), x], 1)
    expected = cka(x.double(), y.double())
    for _ in range(2):
        assert cka(beside, y) == pytest.approx(expected, abs=1e-5)
        assert cka(beside[:, torch.randperm(beside.shape[1])], y) == pytest.approx(
            expected, abs=1e-5
        )
        beside = beside.reshape(16, 1, -1).expand(-1, 3, -1)


def test_features_that_vary_by_rounding_only_do_not_vary():
    # A constant layer, computed in another order for some images; by chance some of its values
    # are near 0, where the same rounding is a large share of them.
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(500, generator=generator)
    level[:20] *= 1e-4
    noise = torch.randint(-1, 2, (16, 500), generator=generator) * 2.0**-23
    assert gram(level + noise).abs().max() == 0
    # One that varies shows, whatever the others do.
    level = (level + noise).clone()
    level[:, 7] += varying(features=1)[:, 0]
    exact = level[:, 7].double()
    torch.testing.assert_close(
        u_centre(gram(level)), u_centre(torch.outer(exact, exact)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-22, 1e-15, 1e15, 1e20, 1e30])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_no_scale_costs_digits(scale, offset):
    # Powers of 2, so that scaling itself rounds nothing.
    scale = 2.0 ** round(np.log2(scale))
    x, y = reference_pair()
    x = (x + offset).float()
    expected = cka(x.double(), y)
    assert cka(scale * x, y) == pytest.approx(expected, abs=1e-6)
    assert cka(scale * x, scale * x) == pytest.approx(1, abs=1e-12)
    wide = scale * x.double()
    torch.testing.assert_close(
        centre(gram(scale * x)) / scale**2, centre(wide @ wide.T) / scale**2, rtol=1e-4, atol=1e-4
    )


def test_what_is_not_finite_stays_so():
    for value in (torch.nan, torch.inf):
        x = varying()
        x[3, 5] = value
        assert not gram(x).isfinite().any()
        assert not gram(torch.full((16, 3), value)).isfinite().any()


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e20])
def test_places_are_told_feature_by_feature_at_any_scale(scale):
    x = scale * varying(features=3 * 8).view(16, 3, 8)
    x[:, 0] = 0.1 * scale
    x[:, 1, 0] = 1e9 * scale
    for place, grams in enumerate(place_grams(x)):
        exact = gram(x[:, place].double())
        if place == 0:
            assert grams.abs().max() == 0
            continue
        torch.testing.assert_close(
            u_centre(grams) / scale**2, u_centre(exact) / scale**2, rtol=1e-5, atol=1e-5
        )


def test_fewer_than_four_examples_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        hsic(torch.zeros(1, 3, 3))


def test_bootstrap_of_a_mean_is_its_standard_error():
    values = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([values, torch.ones(30, dtype=torch.float64)], 1)
    used = torch.ones(30)
    error = bootstrap_error(lambda total: total[0] / total[1], parts, used)
    assert error == pytest.approx(float(values.std() / np.sqrt(30)), rel=0.1)
    # Groups that are not used are not drawn; the same ones are drawn each time.
    more = torch.cat([parts, torch.zeros(2, 2, dtype=torch.float64)])
    again = bootstrap_error(
        lambda total: total[0] / total[1], more, torch.cat([used, torch.zeros(2)])
    )
    assert again == error
    assert np.isnan(bootstrap_error(lambda total: total[:1], parts[:1], torch.ones(1))).all()


def test_bootstrap_of_few_groups_is_no_smaller():
    """Of k groups drawn from themselves the mean varies by (k - 1) / k of what it should."""
    values = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    parts = values[:, None]
    error = bootstrap_error(lambda total: total[0] / 3, parts, torch.ones(3), draws=4000)
    assert error == pytest.approx(float(values.std() / np.sqrt(3)), rel=0.03)


def test_bootstrap_tells_the_spread_of_ranks_where_the_jackknife_does_not():
    """A rank correlation over ten noisy means, measured anew 200 times."""
    generator, line = torch.Generator().manual_seed(0), torch.arange(10).double()

    def rho(total):
        # Spearman's, without ties.
        apart = total.argsort().argsort() - line
        return 1 - 6 * apart.square().sum() / (10 * 99)

    values, errors, left_out = [], [], []
    for _ in range(200):
        groups = 2 * torch.randn(32, 10, dtype=torch.float64, generator=generator) + line / 10
        values.append(float(rho(groups.sum(0))))
        errors.append(bootstrap_error(rho, groups, torch.ones(32), draws=50))
        left_out.append(jackknife(rho, groups, torch.ones(32))[1])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)
    assert np.mean(left_out) > 1.4 * np.std(values)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([values, torch.ones(10, dtype=torch.float64)], 1)
    value, error = jackknife(lambda total: total[0] / total[1], parts, torch.ones(10))
    assert value == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std() / np.sqrt(10)))
    assert np.isnan(jackknife(lambda total: total[0], parts[:1], torch.ones(1))[1])
