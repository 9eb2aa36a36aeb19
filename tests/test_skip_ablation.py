"""Skip ablation: equal to networks written without the skips, and means over the right layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import skip_ablation
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.results.result import load_result
from vitprobe.statistics.hsic import cka


class Block(nn.Module):
    def __init__(self, skips=True):
        super().__init__()
        self.skips = skips
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        branch = self.second(torch.tanh(self.first(x)))
        return x + branch if self.skips else branch


class Net(nn.Module):
    """Pixels as tokens, then four blocks; ``without`` lists those that add nothing."""

    def __init__(self, without=()):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.blocks = nn.Sequential(*(Block(i not in without) for i in range(4)))

    def forward(self, images):
        return self.blocks(self.embed(images.flatten(2).mT))


@pytest.fixture
def images():
    return torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def twin(net, without):
    other = Net(without)
    other.load_state_dict(net.state_dict())
    return other


def outputs(net, images):
    found = []
    handles = [b.register_forward_hook(lambda m, a, y: found.append(y)) for b in net.blocks]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("without", [(2,), (0, 1, 2, 3)])
def test_ablated_blocks_equal_the_network_written_without(images, without):
    torch.manual_seed(0)
    net = Net()
    if len(without) == 1:
        result = skip_ablation.measure(net, images, layers="blocks", blocks=without)
        values, expected = result.cka[1], outputs(twin(net, without), images)
    else:
        # A block around all of them removes every skip of the net.

        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.ModuleList(net.blocks)
                self.embed = net.embed

            def forward(self, images):
                x = self.embed(images.flatten(2).mT)
                for part in self.parts:
                    branch = part.second(torch.tanh(part.first(x)))
                    x = x + branch
                return x

        result = skip_ablation.measure(
            nn.Sequential(Whole()), images, layers=["0 sum *"], blocks=["0"]
        )
        values, expected = result.cka[1], outputs(twin(net, without), images)
    for i in range(4):
        for j in range(4):
            assert values[i, j] == pytest.approx(cka(expected[i], expected[j]), abs=1e-5)
    assert not np.allclose(result.cka[0], result.cka[1], atol=1e-3)


def test_the_model_as_it_is_is_the_first_panel(images):
    torch.manual_seed(0)
    net = Net()
    result = skip_ablation.measure(net, images, layers="blocks", blocks=["blocks.1", -1])
    expected = outputs(net, images)
    assert result.cka[0, 0, 3] == pytest.approx(cka(expected[0], expected[3]), abs=1e-6)
    assert result.block.tolist() == ["", "blocks.1", "blocks.3"]
    assert result.meta["experiment"] == "removed at test time"
    # The module keeps its skips.
    torch.testing.assert_close(outputs(net, images), expected, rtol=0, atol=0)


def test_means_across_and_within_by_hand(images):
    torch.manual_seed(0)
    result = skip_ablation.measure(Net(), images, layers="blocks", blocks=[2])
    assert result.side[1].tolist() == [0, 0, 2, 2]
    for first, panel in ((0, 1), (2, 0)):
        values = result.cka[panel]
        across = values[:2, 2:].mean()
        within = (values[0, 1] + values[2, 3]) / 2
        np.testing.assert_allclose(result.means[1, first : first + 2], [across, within], rtol=1e-6)
    assert result.loss[1, 0] == pytest.approx(result.means[1, 2] - result.means[1, 0])
    assert np.isnan(result.means[0]).all()


def test_sides_of_the_papers_layers_leave_the_block_out():
    net = timm.create_model("test_vit", img_size=32)
    result = skip_ablation.measure(net, torch.randn(6, 3, 32, 32), blocks=[3])
    side = dict(zip(result.layers[1], result.side[1]))
    assert side["blocks.2 sum 2"] == 0 and side["blocks.3 sum 2"] == 2 and side["norm"] == 2
    inside = [name for name, value in side.items() if value == 1]
    assert inside and all(name.startswith("blocks.3") for name in inside)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_models_of_timm_and_several_at_once(name, tensors, tmp_path):
    net = timm.create_model(name, **({"img_size": 32} if name == "test_vit" else {}))
    models = [wrap(net, "a"), wrap(copy.deepcopy(net), "b")]
    result = skip_ablation.measure(models, tensors, batch_size=5)
    count = len(result.block) // 2
    assert result.model_of_panel.tolist() == [0] * count + [1] * count
    np.testing.assert_array_equal(result.cka[:count], result.cka[count:])
    assert len(result.findings()) == 2 * (count - 1)
    result.save(tmp_path / "x")
    again = load_result(tmp_path / "x.npz")
    for field, array in result.arrays().items():
        np.testing.assert_array_equal(getattr(again, field), array)
    figure = again.plot()
    drawn = figure.axes[1].images[0].get_array()
    size = (result.layers[1] != "").sum()
    np.testing.assert_array_equal(drawn.filled(np.nan), result.cka[1, :size, :size])
    assert "skips of" in figure.axes[1].get_title()
    again.plot(figure.add_subplot())


def test_trained_without_compares_given_models(images):
    torch.manual_seed(0)
    net = Net()
    models = [wrap(net, "with"), wrap(twin(net, (2,)), "without")]
    result = skip_ablation.measure(models, images, layers="blocks", trained_without=2)
    removed = skip_ablation.measure(net, images, layers="blocks", blocks=[2])
    assert result.block.tolist() == ["", "blocks.2"] and result.model_of_panel.tolist() == [0, 1]
    # The second model adds nothing in the block: its layers are found all the same.
    np.testing.assert_allclose(result.cka[1], removed.cka[1], atol=1e-6)
    np.testing.assert_allclose(result.means, removed.means, atol=1e-6)
    assert result.meta["experiment"] == "trained without"
    assert "removed at test time" not in result.findings()[0].source
    with pytest.raises(
        VitprobeError, match=r"again was not trained without the skips of blocks\.2"
    ):
        skip_ablation.measure(
            [models[0], wrap(twin(net, ()), "again")], images, trained_without="blocks.2"
        )
    for few, blocks in ((net, 2), (models, [2, 1]), ([*models, models[0]], 2), (models, [])):
        with pytest.raises(VitprobeError, match="takes a model with all skips, then one for each"):
            skip_ablation.measure(few, images, trained_without=blocks)


def test_several_models_trained_without_a_block_each(images):
    torch.manual_seed(0)
    net = Net()
    models = [wrap(net, "with"), wrap(twin(net, (1,)), "early"), wrap(twin(net, (2,)), "middle")]
    options = {"layers": "blocks", "trained_without": [1, "blocks.2"]}
    result = skip_ablation.measure(models, images, **options)
    assert result.block.tolist() == ["", "blocks.1", "blocks.2"]
    for panel, model in ((1, models[1]), (2, models[2])):
        alone = skip_ablation.measure(
            [models[0], model], images, layers="blocks", trained_without=panel
        )
        np.testing.assert_array_equal(result.cka[panel], alone.cka[1])
        np.testing.assert_array_equal(result.means[panel], alone.means[1])
        assert result.findings()[panel - 1].models == [model.name]
    with pytest.raises(VitprobeError, match=r"middle was not trained without .* blocks\.1"):
        skip_ablation.measure(models, images, layers="blocks", trained_without=[1, 1])


def test_errors(images):
    with pytest.raises(VitprobeError, match=r"no block 9: it has 4, from 0 \(blocks.0\)"):
        skip_ablation.measure(Net(), images, blocks=[9])
    with pytest.raises(VitprobeError, match=r"no block 'blocks\.7'\. Did you mean"):
        skip_ablation.measure(Net(), images, blocks=["blocks.7"])
    with pytest.raises(VitprobeError, match="no residual additions"):
        skip_ablation.measure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), images)
    with pytest.raises(VitprobeError, match="are too few"):
        skip_ablation.measure(Net(), images[:3])


def test_command(tmp_path, capsys):
    arguments = ["--models", "test_vit@random", "--image-size", "32", "--num-images", "8"]
    arguments += ["--blocks", "1", "blocks.4", "--batch-size", "4"]
    arguments += ["--out", str(tmp_path), "--stem", "s", "--quiet"]
    assert skip_ablation.main(arguments) == 0
    out = capsys.readouterr().out
    assert "s.png" in out and out.count("removed at test time, layers") == 2
