"""The bundled networks: the recipe's members, as accurate as their cards and their page say."""

import math
import re
from pathlib import Path

import pytest
import torch

from vitprobe import data
from vitprobe.data.scenes import scenes

ANALYSES = Path(__file__).parents[1] / "analyses"
PAGE = Path(data.__file__).parent / "README.md"
SEEN = 400


@pytest.fixture(scope="module")
def held_out():
    return scenes(SEEN, split="test", size=32)


@pytest.mark.skipif(not ANALYSES.is_dir(), reason="the script is no part of the package")
def test_every_member_of_the_family_was_trained_by_the_recipe_of_the_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ANALYSES))
    import train_family

    assert set(data.names()) == set(train_family.MEMBERS)
    for name in train_family.MEMBERS:
        options = train_family.parse([name, "--device", "cpu"])
        source = train_family.SceneStream(options.train_size, options.seed)
        card = train_family.describe(name, options, source)
        assert train_family.is_shipped(card), name


@pytest.mark.parametrize("name", data.names())
def test_a_network_is_as_accurate_as_its_card_says(name, held_out):
    card = data.load_card(name)
    images = torch.from_numpy(held_out.images).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(card["mean"])[:, None, None]) / card["std"][0]
    with torch.inference_mode():
        right = data.build(card)(images).argmax(1).numpy() == held_out.labels
    share = card["test_accuracy"]
    assert abs(right.mean() - share) < 4 * math.sqrt(share * (1 - share) / SEEN)


def test_the_page_has_the_numbers_of_the_cards_and_the_weights_are_few():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) % \|$", PAGE.read_text("utf-8"), re.M)
    cards = {name: f"{100 * data.load_card(name)['test_accuracy']:.1f}" for name in data.names()}
    assert dict(rows) == cards
    assert sum(data.weights_path(name).stat().st_size for name in cards) < 25e6


def test_no_two_networks_begin_with_the_same_weights():
    seeds = [data.load_card(name)["seed"] for name in data.names()]
    assert len(set(seeds)) == len(seeds) > 1
