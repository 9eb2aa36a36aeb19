"""Every fact that decides a result, changed alone, makes another run.

The facts are read off the fingerprint itself, so that a new one is tested from the day it is
added; what must be among them is changed in the run, one after the other.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.running import session as module
from vitprobe.running.checkpoint import Checkpoint
from vitprobe.running.options import Options
from vitprobe.running.session import session

OPTIONS = {"batch_size": 4, "device": "cpu"}


def net(seed=0):
    torch.manual_seed(seed)
    return wrap(
        timm.create_model("test_resnet", num_classes=4).eval(),
        "net",
        transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
    )


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        pixels = np.full((32, 32, 3), 20 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.bmp")
    return tmp_path


def key(folder, model=None, **options):
    with session(model or net(), folder, Options(**{**OPTIONS, **options})) as ready:
        return Checkpoint(None, ready.fingerprint(), len(ready.batches), 0).key


def leaves(facts, path=()):
    """The way to every single value."""
    if isinstance(facts, dict):
        for name, value in facts.items():
            yield from leaves(value, (*path, name))
    elif isinstance(facts, list):
        for i, value in enumerate(facts):
            yield from leaves(value, (*path, i))
    else:
        yield path


def test_every_fact_changed_alone_gives_another_key(folder):
    with session(net(), folder, Options(**OPTIONS)) as ready:
        facts = ready.fingerprint()
    keys = {Checkpoint(None, facts, 2, 0).key}
    ways = list(leaves(facts))
    for way in ways:
        changed = copy.deepcopy(facts)
        inner = changed
        for step in way[:-1]:
            inner = inner[step]
        inner[way[-1]] = f"{inner[way[-1]]} but other"
        keys.add(Checkpoint(None, changed, 2, 0).key)
    assert len(keys) == len(ways) + 1


def test_every_option_that_decides_gives_another_key(folder):
    base = key(folder)
    assert key(folder) == base
    for options in (
        {"precision": "bf16"},
        {"batch_size": 3},
        {"seed": 1},
        {"num_images": 5},
        {"names": ["other"]},
    ):
        assert key(folder, **options) != base, options
    assert key(folder, net(seed=1)) != base


def test_every_fact_counts_on_the_same_images(folder):
    """Another seed draws other images, which alone would be another run."""
    with session(net(), folder, Options(**OPTIONS)) as ready:
        before, options = ready.fingerprint(), ready.options
        for changed in ({"seed": 1}, {"precision": "bf16"}, {"batch_size": 3}):
            ready.options = replace(options, **changed)
            assert ready.fingerprint() != before, changed
        ready.options, ready.device = options, torch.device("meta")
        assert ready.fingerprint() != before


def test_an_image_rewritten_at_its_size_is_another_run(folder):
    base, before = key(folder), open_images(folder)
    file = folder / "3.bmp"
    size = file.stat().st_size
    Image.fromarray(np.full((32, 32, 3), 255, dtype=np.uint8)).save(file)
    assert file.stat().st_size == size
    assert open_images(folder).digest == before.digest
    assert key(folder) != base


def test_versions_are_facts(folder, monkeypatch):
    base = key(folder)
    told = module.versions()
    for name in told:
        monkeypatch.setattr(module, "versions", lambda name=name: {**told, name: "0"})
        assert key(folder) != base, name
