"""The table of a model's layers: names that select just them, what was found, what can be had."""

import json
from importlib import import_module

import pytest
import timm
import torch
from torch import nn

import vitprobe
from vitprobe import cka, layer_table
from vitprobe.__main__ import main
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.tracing.layers import map_layers

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def untried(monkeypatch):
    """Measurements are not tried where nothing is asked about them."""
    monkeypatch.setattr(layer_table, "applicable", lambda *_: {})


class Twofold(nn.Module):
    """Puts out a tuple and a dict."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        y = self.lin(x).tanh()
        return y, {"hidden": y.sin(), "mean": y.mean(1)}


class Awkward(nn.Module):
    """Modules called as sets, as the model's own output, as numbers, and one in two places."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.all = nn.Linear(8, 8)
        self.last = nn.Tanh()
        self.add_module("3", nn.Linear(8, 8))
        self.add_module("all sum", nn.Linear(8, 8))
        self.twofold = Twofold()
        self.again = self.all
        self.output = nn.Linear(8, 8)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = self.last(self.all(self.blocks(x)))
        x = x + getattr(self, "all sum")(x).relu()
        x, more = self.twofold(getattr(self, "3")(self.again(x)))
        return self.output(x + more["hidden"]) * 2


def networks():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    yield "awkward", Awkward()
    yield "shared", nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(16, 8), shared,
                                  nn.ReLU(), shared)  # fmt: skip
    yield "vit", timm.create_model("test_vit", img_size=32)
    yield "resnet", timm.create_model("test_resnet")


@pytest.mark.parametrize(("name", "net"), list(networks()), ids=lambda one: str(one)[:7])
def test_each_name_selects_that_layer_and_no_other(name, net, untried):
    found = map_layers(name, net.eval(), IMAGES)
    everything = [*found.layers, *found.operands]
    labels = [layer.label for layer in everything]
    assert len(set(labels)) == len(labels)
    for layer in everything:
        assert found.choose(layer.label) == [layer] == found.choose([layer.label])
    table = vitprobe.layers(wrap(net, name), example=IMAGES)
    assert set(table.names) <= set(labels)
    for row in table:
        for other in row["also"]:
            (chosen,) = found.choose(other)
            mine = next(layer for layer in everything if layer.label == row["name"])
            assert chosen == mine or chosen.identity == mine.identity


def test_names_that_mean_sets_and_the_models_own_output_are_told_apart():
    found = map_layers("awkward", Awkward().eval(), IMAGES)
    labels = [layer.label for layer in found.layers]
    assert {"blocks:1", "all:1", "all:2", "last:1", "3", "output", "model output"} <= set(labels)
    assert [layer.module for layer in found.choose("output")] == ["output"]
    assert [layer.module for layer in found.choose("model output")] == [""]
    assert {"twofold[0]", "twofold[1]['hidden']"} <= set(labels)
    # Each place of a module that stands in two is one of its calls.
    assert [layer.label for layer in found.choose("again")] == ["all:2"]


def test_numbers_count_layers_of_the_choice():
    found = map_layers("vit", timm.create_model("test_vit", img_size=32).eval(), IMAGES)

    def names(choice):
        return [layer.label for layer in found.choose(choice)]

    paper = names("paper")
    assert names(0) == ["blocks.0"] and names([-1, 1]) == ["blocks.1", "blocks.5"]
    assert names(["paper", 0, -1]) == [paper[0], paper[-1]]
    assert names(["blocks.*.attn", "-2"]) == ["blocks.4.attn"]
    # A name stands for itself beside them.
    assert names(["patch_embed", "-1"]) == ["patch_embed", "blocks.5"]
    with pytest.raises(VitprobeError, match=r"vit has 6 layers for blocks, and none numbered 6: 0 "
                                            r"to 5, or -1 to -6 from the end"):  # fmt: skip
        names(6)
    # A module whose name is a number is meant by it.
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    by_name = map_layers("net", net, IMAGES)
    assert [layer.label for layer in by_name.choose("2")] == ["2"]
    assert [layer.label for layer in by_name.choose(["all", -1])] == ["2"]


def test_numbers_reach_measurements_and_the_command_line(capsys, untried):
    result = cka.measure(["vit_small_box", "resnet_box"], layers=[0, -1], num_images=8)
    assert result.layers.tolist() == ["blocks.0", "blocks.5", "layer1.0", "layer4.1"]
    assert main(["layers", "vit_small_box@random", "--layers", "0", "-1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [row["name"] for row in rows] == ["blocks.0", "blocks.5"]


def test_skips_and_branches_are_layers_that_only_their_names_choose():
    net = timm.create_model("test_vit", img_size=32).eval()
    found = map_layers("vit", net, IMAGES)
    assert [la.label for la in found.choose("blocks.1 branch 2")] == ["blocks.1 branch 2"]
    assert len(found.choose("blocks.* skip *")) == 12
    assert not any(la.point in ("skip", "branch") for la in found.choose(["*", "all", "paper"]))
    sums = cka.measure(
        wrap(net, "vit"), torch.randn(8, 3, 32, 32), layers=["blocks.0", "blocks.1 skip 1"]
    )
    assert sums.cka.min() == pytest.approx(1)


@pytest.fixture(scope="module")
def vit():
    return vitprobe.layers("vit_small_box@random")


def test_the_rows_say_shape_kind_grid_and_what_stands_beside_it(vit):
    table = vit
    rows = {row["name"]: row for row in table}
    assert table.image == (3, 32, 32) and len(table) == len(rows) == len(table.names)
    assert rows["blocks.2"] == {
        "name": "blocks.2", "shape": [65, 128], "kind": "block", "grid": [8, 8], "prefix": 1,
        "choices": ["blocks", "all"], "also": [],
    }  # fmt: skip
    assert rows["blocks.5"]["also"] == ["blocks:1"]
    kinds = {row["kind"] for row in table}
    assert kinds >= {"block", "addition", "skip", "branch", "attention", "MLP hidden", "norm",
                     "convolution"}  # fmt: skip
    for name, kind in [("blocks.0.attn", "attention"), ("blocks.0 sum 1", "addition"),
                       ("blocks.0.norm1", "norm"), ("patch_embed.proj", "convolution"),
                       ("blocks.0.mlp hidden", "MLP hidden"), ("head", "Linear")]:  # fmt: skip
        assert rows[name]["kind"] == kind, name
    assert rows["head"]["grid"] is None and rows["patch_embed.proj"]["prefix"] == 0


def test_what_was_found_and_what_can_be_measured(vit):
    cnn = vitprobe.layers("resnet_box@random")
    assert vit.found["attention"]["blocks.0.attn"] == {"heads": 4, "queries": 65, "keys": 65}
    assert vit.found["additions"] == {"identity": 12}
    assert vit.found["position_tables"] == {"pos_embed": [8, 8, 128]}
    assert vit.found["patch_filters"] == {"patch_embed.proj": [128, 4, 4, 3]}
    can = {name for name, why in vit.measurements.items() if not why}
    assert can == set(vit.measurements) - {"head_subsets"}
    assert vit.measurements["head_subsets"] == cnn.measurements["head_subsets"]
    assert vit.measurements["head_subsets"] == "beside another model"
    assert not cnn.found["attention"] and not cnn.found["position_tables"]
    # In the very words of the measurement that is asked for.
    for name, why in cnn.measurements.items():
        if why and name != "head_subsets":
            measure = import_module(f"vitprobe.{name}").measure
            given = () if name == "position_embedding" else (torch.randn(16, 3, 32, 32),)
            with pytest.raises(VitprobeError) as told:
                measure("resnet_box@random", *given)
            assert str(told.value) == why
    assert {name for name, why in cnn.measurements.items() if why} == {
        "head_subsets", "attention_distance", "attention_rollout", "attention_statistics",
        "position_embedding",
    }  # fmt: skip


def test_a_module_without_a_transform_and_hooks_afterwards():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 5))
    table = vitprobe.layers(wrap(net, "net", input_size=(3, 32, 32)))
    # What the third puts out are the very values of the second.
    assert table.names == ["0", "1", "3"] and net.training
    assert [row["also"] for row in table] == [[], ["2"], ["output"]]
    assert "no residual additions" in table.measurements["skip_ratio"]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_it_shows_itself(capsys, monkeypatch):
    table = vitprobe.layers("vit_small_box@random", ["blocks", "blocks.0.attn"])
    text, html = repr(table), table._repr_html_()
    assert text.startswith("vit_small_box (random): 7 layers for images of 3 × 32 × 32\n")
    assert "attention layers: 6 of 4 heads (blocks.0.attn to blocks.5.attn)" in text
    assert "\n  can have: cka, " in text and "head_subsets: beside another model" in text
    assert html.count("<tr>") == 8 + len(table.measurements) and "8 × 8" in html
    monkeypatch.setattr(layer_table, "applicable", lambda *_: table.measurements)
    assert main(["layers", "vit_small_box@random", "--layers", "blocks", "blocks.0.attn"]) == 0
    assert capsys.readouterr().out == text + "\n"
