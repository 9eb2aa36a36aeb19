"""CKA at the same depth of models given in pairs (Raghu et al. 2021, Fig. 12)."""

import numpy as np
import pytest
import timm
import torch

from vitprobe import cka
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.papers.raghu2021.same_depth import in_pairs
from vitprobe.results.result import load_result


def network(name):
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        return wrap(timm.create_model("test_vit"), name=name)


SMALL, LARGE = network("small"), network("larger")


@pytest.fixture(scope="module")
def images():
    return torch.randn(24, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result(images):
    return cka.measure([SMALL, LARGE, SMALL, SMALL], images, pairwise=True, batch_size=8)


def test_each_model_runs_once_and_pairs_point_to_it(result):
    assert result.models == ["small", "larger"]
    assert [one["pair"] for one in result.meta["same_depth"]] == [[0, 1], [0, 0]]
    module = torch.nn.Identity()
    assert in_pairs([module, "a", "b", module]) == ([module, "a", "b"], [[0, 1], [2, 0]])


def test_the_diagonal_is_that_of_the_whole_matrix(result, images):
    plain = cka.measure([SMALL, LARGE], images, batch_size=8)
    value, error = result.diagonal(0, "larger")
    np.testing.assert_allclose(value, np.diag(plain.of(0, 1)), rtol=1e-12)
    count = len(value)
    np.testing.assert_allclose(error, np.diag(plain.cka_se[:count, count:]), rtol=1e-12)
    own, own_error = result.diagonal(0, 0)
    np.testing.assert_allclose(own, 1, atol=1e-12)
    np.testing.assert_allclose(own_error, 0, atol=1e-12)


def test_summaries_are_means_of_the_diagonal(result):
    first, second = result.meta["same_depth"]
    value, _ = result.diagonal(0, 1)
    third = max(1, len(value) // 3)
    assert first["mean"][0] == pytest.approx(value.mean())
    assert first["fall"][0] == pytest.approx(value[:third].mean() - value[-third:].mean())
    assert "rise" not in second  # the pairs have different second models
    assert first["mean"][1] > 0


def test_a_pair_that_shares_its_second_model_is_compared_with_the_one_before(images):
    found = cka.measure([SMALL, LARGE, LARGE, LARGE], images, pairwise=True, batch_size=8)
    rise = found.meta["same_depth"][1]["rise"]
    assert rise[0] == pytest.approx(1 - found.diagonal(0, 1)[0].mean())
    claims = found.findings()
    assert len(claims) == 3
    assert claims[2].verdict == "holds"
    assert "larger is more like larger than small is" in claims[2].claim


def test_the_lines_drawn_are_the_diagonals(result):
    figure = result.plot()
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert len(lines) == 2
    np.testing.assert_array_equal(lines[0].get_ydata(), result.diagonal(0, 1)[0])
    assert figure.axes[0].get_legend().texts[0].get_text() == "small × larger"


def test_pairs_of_two_depths_are_drawn_over_the_share_of_depth(result, images):
    axes = result.plot().axes[0]
    assert axes.get_xlabel() == "layer (names of small)"
    assert [text.get_text() for text in axes.get_xticklabels()] == list(result.layers[:6])
    deeper = wrap(timm.create_model("test_vit2"), name="deeper")
    axes = cka.measure([SMALL, LARGE, deeper, deeper], images, pairwise=True).plot().axes[0]
    places = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    depths = [len(place) for place in places]
    assert depths[0] < depths[1] and axes.get_xlabel() == "depth (share of layers)"
    for place, depth in zip(places, depths):
        np.testing.assert_allclose(place, np.linspace(0, 1, depth))


def test_what_does_not_pair_is_refused(images):
    with pytest.raises(VitprobeError, match=r"in pairs.*not 3"):
        cka.measure([SMALL, LARGE, SMALL], images, pairwise=True)
    with pytest.raises(VitprobeError, match="networks of one depth"):
        cka.measure([SMALL, wrap(timm.create_model("test_vit2"))], images, pairwise=True)


def test_the_command_names_each_model_once(tmp_path, pictures, capsys):
    name = "test_vit@random"
    arguments = ["--pairwise", name, name, "--images", str(pictures), "--batch-size", "4"]
    assert cka.main([*arguments, "--out", str(tmp_path)]) == 0
    loaded = load_result(tmp_path / "cka-test_vit-random.npz")
    assert [one["pair"] for one in loaded.meta["same_depth"]] == [[0, 0]]
    assert "at the same depth" in capsys.readouterr().out
