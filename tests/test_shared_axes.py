"""Panels of one quantity share their axis: what is higher in one is higher in the other."""

import numpy as np
import pytest

from vitprobe import attention_distance, frequency, occlusion, skip_ablation


@pytest.fixture(scope="module")
def drawn():
    """Panels by measurement: those with a title or label, colour bars left out."""
    options = {"num_images": 8, "batch_size": 4, "quiet": True}
    two = ["vit_small_box@random", "vit_gap_box@random"]
    return {
        "distance": attention_distance.measure(two, **options).figure().axes,
        "frequency": frequency.measure(two, **options).figure().axes,
        "occlusion": occlusion.measure(two, **options).figure().axes,
        "ablation": skip_ablation.measure(two[:1], blocks=[1, 4], **options).figure().axes,
    }


def joined(axis, panels):
    """Indices of the panels that share an axis, by groups."""
    groups = getattr(panels[0], f"get_shared_{axis}_axes")()
    found = {
        tuple(i for i, b in enumerate(panels) if a is b or groups.joined(a, b)) for a in panels
    }
    return sorted(found)


def test_heads_in_order_and_against_depth_have_one_scale_of_distances(drawn):
    panels = drawn["distance"]
    assert joined("y", panels) == [(0, 1), (2, 3)]
    assert [bool(one.get_ylabel()) for one in panels] == [True, False, True, False]
    # Both models are drawn to one scale, too.
    assert len({one.get_ylim() for one in panels}) == 1


def test_frequencies_and_variance_are_drawn_over_the_same_layers(drawn):
    panels = drawn["frequency"]
    assert joined("x", panels) == [(0,), (1, 2), (3,), (4, 5)]
    names = [[tick.get_text() for tick in one.get_xticklabels()] for one in panels[1:3]]
    assert names[0] == names[1] and all(names[0])


def test_agreement_and_accuracy_are_drawn_over_the_same_levels(drawn):
    panels = drawn["occlusion"]
    assert joined("y", panels) == [(0, 1), (2, 3)] and joined("x", panels) == [(0, 2), (1, 3)]
    assert [bool(one.get_xlabel()) for one in panels] == [False, False, True, True]


def test_maps_without_skips_have_the_layers_of_the_first(drawn):
    panels = [one for one in drawn["ablation"] if one.images]
    assert joined("y", panels) == [tuple(range(len(panels)))] and len(panels) == 3
    first, *others = [one.yaxis.get_tick_params()["labelleft"] for one in panels]
    assert first and not any(others)
    assert np.ptp([one.get_ylim() for one in panels], 0).max() == 0
