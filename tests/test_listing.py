"""``vitprobe models`` and ``vitprobe layers``."""

import json

import pytest
import timm
import torch

from vitprobe import __main__, layer_table
from vitprobe.models.names import ALIASES, bundled_models


@pytest.fixture
def caches(hub_cache, tmp_path, monkeypatch):
    """Empty caches of the hub and of torch."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def told(capsys, *arguments):
    assert __main__.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_models_lists_what_is_bundled_and_the_aliases_with_what_they_stand_for(caches, capsys):
    rows = {row["name"]: row for row in json.loads(told(capsys, "models", "--json"))}
    assert list(rows) == [*bundled_models(), *ALIASES]
    assert rows["vit_small_box"]["accuracy"] == 0.956 and rows["vit_small_box"]["cached"]
    assert rows["vit_b16"]["stands_for"] == "vit_base_patch16_224.augreg_in21k_ft_in1k"
    table = told(capsys, "models")
    assert "95.6% of held-out digit scenes right" in table
    assert "vit_base_patch16_224.augreg_in21k_ft_in1k" in table


def test_a_pattern_finds_timm_models_too_and_says_which_have_no_weights(caches, capsys):
    rows = json.loads(told(capsys, "models", "resnet18*", "--json"))
    kinds = {(row["name"], row["kind"]) for row in rows}
    assert {("resnet18", "alias"), ("resnet18.tv_in1k", "timm")} <= kinds
    assert all(row["name"].startswith("resnet18") for row in rows)
    # Part of a name will do.
    assert "vit_small_patch14_dinov2.lvd142m" in told(capsys, "models", "dinov2")
    trained = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    bare = next(name for name in timm.list_models() if name not in trained)
    rows = json.loads(told(capsys, "models", bare, "--json"))
    assert [row["trained"] for row in rows if row["name"] == bare] == [False]


def test_weights_in_a_local_cache_are_marked(caches, capsys):
    def cached():
        rows = json.loads(told(capsys, "models", "resnet18.tv_in1k", "--json"))
        return {row["name"]: row["cached"] for row in rows}

    assert cached() == {"resnet18": False, "resnet18.tv_in1k": False}
    folder = caches / "hub" / "models--timm--resnet18.tv_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    assert not any(cached().values())
    (folder / "snapshots" / "abc" / "model.safetensors").touch()
    assert cached() == {"resnet18": True, "resnet18.tv_in1k": True}
    assert "on this machine" in told(capsys, "models", "resnet18.tv_in1k")


def test_no_model_that_matches_is_an_error_with_the_nearest(caches, capsys):
    assert __main__.main(["models", "vit_b61"]) == 2
    error = capsys.readouterr().err
    assert "No model matches 'vit_b61'. Did you mean" in error and error.count("\n") == 1


@pytest.fixture
def untried(monkeypatch):
    """Measurements are not tried: what can be had has tests of its own."""
    monkeypatch.setattr(layer_table, "applicable", lambda *_: {})


def test_layers_lists_names_shapes_kinds_and_the_choices_they_are_in(untried, capsys):
    rows = json.loads(told(capsys, "layers", "vit_small_box@random", "--json"))["layers"]
    by_name = {row["name"]: row for row in rows}
    # 8 × 8 patches and a class token, 128 wide; forward order.
    assert by_name["blocks.0.mlp hidden"] == {
        "name": "blocks.0.mlp hidden", "shape": [65, 512], "kind": "MLP hidden",
        "choices": ["paper"], "grid": [8, 8], "prefix": 1,
        "also": ["blocks.0.mlp.act", "blocks.0.mlp.drop1", "blocks.0.mlp.norm"],
    }  # fmt: skip
    assert by_name["blocks.0 sum 1"]["kind"] == "addition"
    assert by_name["blocks.5"]["choices"] == ["blocks", "all"]
    assert by_name["head"]["shape"] == [10] and by_name["head"]["kind"] == "Linear"
    names = list(by_name)
    assert names.index("blocks.0.norm1") < names.index("blocks.0 sum 1") < names.index("blocks.1")
    table = told(capsys, "layers", "vit_small_box@random", "--layers", "blocks")
    assert table.startswith("vit_small_box (random): 6 layers for images of 3 × 32 × 32\n")
    names = [line.split()[0] for line in table.splitlines()[3:9]]
    assert names == [f"blocks.{i}" for i in range(6)]


def test_layers_of_nothing_is_one_line(capsys):
    assert __main__.main(["layers", "vit_small_box", "--layers", "blokcs.0"]) == 2
    assert "has no layer 'blokcs.0'. Did you mean blocks.0" in capsys.readouterr().err
