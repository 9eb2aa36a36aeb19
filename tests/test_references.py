"""Whole measurements against their definitions, written out in float64 in ``references``.

Every number and standard error is compared however the measurement is made: by itself, from one
pass with the others, stopped and resumed, in two processes, and with batches of another size.
Probes have images of their own, and stand here.
"""

from __future__ import annotations

import signal
from functools import cache

import by_hand as hand
import numpy as np
import pytest
import references  # noqa: F401  (fills REFERENCES)
import torch
from by_hand import ORDER, REFERENCES
from two_processes import results_of

from vitprobe import linear_probe, wrap
from vitprobe.catalogue import measurements
from vitprobe.images.sources import Images, TensorSource
from vitprobe.running.interrupts import Interrupted
from vitprobe.running.loading import TransformedImages
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_each, measure_one
from vitprobe.together import measurement_class

BATCH, OTHER = 7, 5
# They look at the weights alone, or at images of their own; see their tests.
ELSEWHERE = {"linear_probe", "position_embedding", "patch_embedding", "occlusion"}


def models(names):
    made = {"vit": hand.vit, "cnn": hand.cnn}
    return [wrap(made[name](), name) for name in names]


def measurement(name):
    return measurement_class(name)(**REFERENCES[name].options)


def all_at_once(batch_size=BATCH, **options):
    """The results of all references, those of the same models from one pass."""
    found = {}
    for chosen in sorted({one.models for one in REFERENCES.values()}):
        mine = {name: measurement(name) for name, one in REFERENCES.items() if one.models == chosen}
        asked = Options(batch_size=batch_size, device="cpu", **options)
        found |= measure_each(mine, models(chosen), hand.images(), asked)
    return found


@cache
def seen(batch_size):
    pixels = hand.images()[ORDER].double()
    return hand.slow_pass(hand.vit(), pixels, hand.batches(batch_size))


def check(results, batch_size=BATCH):
    for name, result in results.items():
        equal = list(REFERENCES[name].equals(result, seen(batch_size)))
        assert equal, name
        for one in equal:
            one.check()


def test_every_measurement_has_one():
    assert set(REFERENCES) | ELSEWHERE == set(measurements())


@pytest.mark.parametrize("name", REFERENCES)
def test_alone(name):
    options = Options(batch_size=BATCH, device="cpu")
    one = measurement(name)
    chosen = models(REFERENCES[name].models)
    check({name: measure_one(one, chosen, hand.images(), options)})


@pytest.mark.parametrize("batch_size", [BATCH, OTHER])
def test_in_one_pass(batch_size):
    results = all_at_once(batch_size)
    assert set(results) == set(REFERENCES)
    check(results, batch_size)


def test_stopped_and_resumed(tmp_path, monkeypatch):
    read, stopped = TransformedImages.__getitem__, []

    def stops(self, position):
        if position == 9 and len(self.group_of_model) not in stopped:
            stopped.append(len(self.group_of_model))
            signal.raise_signal(signal.SIGINT)
        return read(self, position)

    monkeypatch.setattr(TransformedImages, "__getitem__", stops)
    kept = {"checkpoint": tmp_path / "state", "save_every": 0.0}
    for _ in range(2):
        with pytest.raises(Interrupted, match="Stopped after batch 1 of"):
            all_at_once(**kept)
    check(all_at_once(**kept))


def test_in_two_processes(tmp_path):
    results = results_of("test_references", "all_at_once()", tmp_path)
    assert set(results) == set(REFERENCES)
    check(results)


def test_linear_probe():
    generator = torch.Generator().manual_seed(3)
    labels = np.arange(60) % 3
    pixels = torch.randn(60, 3, 32, 32, generator=generator)
    pixels[:, 0] += 0.3 * torch.from_numpy(labels - 1)[:, None, None]
    source = Images(
        "made", TensorSource(pixels), np.arange(60), "", labels=labels, classes=("a", "b", "c")
    )
    fit, test = (source.choose(np.arange(*ends)) for ends in ((0, 24), (24, 60)))
    result = linear_probe.measure(
        wrap(hand.vit()),
        fit,
        test_images=test,
        layers="blocks.1",
        shots=4,
        draws=2,
        batch_size=BATCH,
    )
    tokens = hand.slow_pass(hand.vit(), pixels.double()).block[1].detach().numpy()
    reads = {str(name): None for name in result.readouts}
    reads["CLS"], reads["first patch"] = tokens[:, :1], tokens[:, 1:2]
    reads["mean"], reads["tokens"] = tokens[:, 1:].mean(1, keepdims=True), tokens[:, 1:]
    reads["all"] = tokens.reshape(60, 1, -1)
    shown = []
    for draw in range(2):
        # The first four of each class in the first draw, the next four in the second.
        rows = np.concatenate([np.flatnonzero(labels[:24] == c)[4 * draw :][:4] for c in range(3)])
        shown.append(
            [
                np.mean([hand.slow_probe(one[:, i], rows, labels) for i in range(one.shape[1])])
                for one in reads.values()
            ]
        )
    accuracy = np.mean(shown, 0)
    hand.Equal(result.accuracy_of_draw[:, 0], shown, atol=1e-9).check()
    tests = accuracy * (1 - accuracy) / 36
    expected = np.sqrt(np.var(shown, 0, ddof=1) / 2 + tests)
    hand.Equal(result.accuracy_se[0], expected, atol=1e-9).check()
