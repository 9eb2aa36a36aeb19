"""Rows keep to their images, passes give the same twice, and every name means its layer."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitprobe
from vitprobe import cka
from vitprobe.errors import VitprobeError
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.trace import record


def mapped(module, side=32):
    torch.manual_seed(0)
    return map_layers("net", module.eval(), torch.randn(2, 3, side, side))


def labels(module, choice="all"):
    return [layer.label for layer in mapped(module).choose(choice)]


class Between(nn.Module):
    """Patches, something done between them and a norm, a head."""

    def __init__(self, between):
        super().__init__()
        self.between, self.patch = between, nn.Conv2d(3, 8, 8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.between(self.patch(x).flatten(2).mT)))


MIXING = {
    "the next image's": lambda x: x.roll(1, 0),
    "two images on": lambda x: x.roll(2, 0),
    "turned round": lambda x: x.flip(0),
    "centred over the batch": lambda x: x - x.mean(0),
    "sorted": lambda x: x[x.sum((1, 2)).argsort()],
    "statistics of the batch": lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
}


@pytest.mark.parametrize("way", MIXING)
def test_images_that_see_each_other_are_told_by_the_layer_where_they_start(way):
    with pytest.raises(VitprobeError, match=r"see each other in net, from norm on"):
        mapped(Between(MIXING[way]))


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: F.dropout(x, 0.1, training=True),
        lambda x: x + 1e-2 * torch.randn_like(x),
        lambda x: x[:, torch.randperm(x.shape[1])],
    ],
)
def test_a_random_pass_is_told_by_the_layer_where_it_starts(noise):
    with pytest.raises(VitprobeError, match=r"net gives other values .* each time, from norm on"):
        mapped(Between(noise))


def test_what_is_left_out_is_said(capsys):
    class Cross(nn.Module):
        """Compares the images of a batch beside what it says of each."""

        def __init__(self):
            super().__init__()
            self.inner, self.compare = Between(nn.Identity()), nn.Identity()

        def forward(self, x):
            x = self.inner(x).mean(1)
            return {"features": x, "alike": self.compare(x @ x.T)}

    found = mapped(Cross())
    chosen = [layer.label for layer in found.choose("all")]
    assert chosen == ["inner.patch", "inner.norm", "inner.head", "output['features']"]
    assert found.left_out == {
        "compare": "has no axis that counts the images",
        "output['alike']": "has no axis that counts the images",
    }
    with pytest.raises(VitprobeError, match="The layer compare of net has no axis that counts"):
        found.choose("compare")
    cka.measure(
        vitprobe.wrap(Cross(), name="net"), torch.randn(8, 3, 32, 32), layers="all", quiet=True
    )
    said = capsys.readouterr().err
    assert "net: compare has no axis that counts the images and is left out, and so are 1 more" in (
        said
    )


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.pooled = nn.Conv2d(3, 8, 8, 8), nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.pooled(self.patch(x).mean((2, 3), keepdim=True).squeeze()))


def test_a_layer_of_another_rank_for_a_batch_of_one_is_measured():
    model = Squeezed()
    layers = mapped(model).choose("all")
    assert [layer.label for layer in layers] == ["patch", "pooled", "head"]
    x, seen = torch.randn(3, 3, 32, 32), []
    with capture(model, layers, lambda i, tensor: seen.append(tensor.clone())), torch.no_grad():
        model(x)
        model(x[1:2])
    for whole, one in zip(seen[:3], seen[3:]):
        assert one.shape == (1, *whole.shape[1:])
        torch.testing.assert_close(one[0], whole[1])


def test_windows_in_front_of_images_come_back_to_their_images():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.window, self.head = (
                nn.Conv2d(3, 8, 8, 8),
                nn.Linear(8, 8),
                nn.Flatten(),
            )

        def forward(self, x):
            x = self.patch(x).flatten(2).mT.unflatten(1, (4, 4)).transpose(0, 1)
            return self.head(self.window(x.flatten(0, 1)).unflatten(0, (4, -1)).transpose(0, 1))

    model = Windows()
    layers = mapped(model).choose(["window", "head"])
    assert [layer.images_first for layer in layers] == [False, True]
    seen = []
    with capture(model, layers, lambda i, tensor: seen.append(tensor.flatten(1))), torch.no_grad():
        model(torch.randn(3, 3, 32, 32))
    assert torch.equal(*seen)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.f(x)), {"sum [0]": x.sin()}


class Names(nn.Module):
    """Brackets in labels beside names that a wildcard in brackets would mean."""

    def __init__(self):
        super().__init__()
        self.patch, self.pair, self.pair0 = nn.Conv2d(3, 8, 8, 8), Pair(), nn.Linear(8, 8)
        self.act = nn.ReLU()
        self.steps = nn.ModuleList([self.pair0, self.act, nn.Linear(8, 8), self.act])
        self.second = self.patch

    def forward(self, x):
        x, _ = self.pair(self.second(x).flatten(2).mT)
        for step in self.steps:
            x = step(x)
        return x


def test_every_printed_label_selects_its_layer_and_no_other():
    found = mapped(Names())
    everything = found.choose("all")
    assert {"pair[0]", "pair[1]['sum [0]']", "pair0", "act:1", "act:2"} <= {
        layer.label for layer in everything
    }
    for layer in found.layers:
        assert found.choose(layer.label) == [layer]
    assert found.choose([layer.label for layer in everything]) == everything
    assert [layer.label for layer in found.choose("pair*[0]")] == ["pair[0]"]


def test_every_name_of_a_module_selects_its_layer():
    found = mapped(Names())

    def chosen(name):
        return [layer.label for layer in found.choose(name)]

    assert chosen("second") == ["patch"] == chosen("patch")
    assert chosen("steps.0") == ["pair0"]
    assert chosen("steps.2") == ["steps.2"]
    # Three names and two calls: the name means the module.
    assert chosen("steps.1") == ["act:1", "act:2"]

    shared = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    shared.append(shared[1])
    found = mapped(shared)
    assert chosen("3") == ["1:2"]
    assert chosen("1:1") == ["1:1"]


class Outside(nn.Module):
    """A step by NumPy, which no observer of operations can see."""

    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.step, self.patch = step, nn.Conv2d(3, 8, 8, 8)
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        return x + self.two(self.step(self.one(x)))


def test_a_step_outside_of_torch_does_not_hide_what_follows():
    def by_numpy(x):
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    x = torch.randn(2, 3, 32, 32)
    expected, trace = (record(Outside(step), x) for step in (torch.tanh, by_numpy))
    assert [(a.kind, a.skip) for a in trace.additions] == [("identity", 0)]
    assert [(c.name, [info.depends for _, info in c.outputs]) for c in trace.calls] == [
        (c.name, [info.depends for _, info in c.outputs]) for c in expected.calls
    ]
    assert labels(Outside(by_numpy)) == labels(Outside(torch.tanh))


def test_a_constant_from_outside_is_not_of_the_images():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            table = torch.from_numpy(np.ones((2, 5, 8), np.float32))
            return x + self.f(table)

    trace = record(Tables(), torch.randn(2, 5, 8))
    assert not trace.calls[0].outputs[0][1].depends
