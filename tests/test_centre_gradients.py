"""Gradients of layers' centres: where they flow, why not, and through norms made faster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vitprobe import receptive_field
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.tracing.centre_gradients import FastNorms


class Frozen(nn.Module):
    """A backbone without gradients, in one of several ways, and a head."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1), nn.ReLU())
            for i in range(3)
        )

    def forward(self, x):
        if self.way == "no_grad":
            with torch.no_grad():
                x = self.blocks[0](x)
        elif self.way == "inference_mode":
            with torch.inference_mode():
                x = self.blocks[0](x)
            x = x.clone()
        else:
            x = self.blocks[0](x)
        if self.way == "detach":
            x = x.detach()
        if self.way == "own leaf":
            x = x.detach().requires_grad_()
        if self.way == "rewritten":
            y = x.exp()
            x = y.add_(1)
        return self.blocks[2](self.blocks[1](x))


@pytest.mark.parametrize(
    "way, reason",
    [
        ("no_grad", r"layer blocks\.0 of Frozen .* it runs under torch\.no_grad\(\)"),
        ("inference_mode", r"layer blocks\.0 of Frozen .* under torch\.inference_mode\(\)"),
        ("rewritten", r"Frozen cannot be differentiated: .* modified by an inplace operation"),
    ],
)
def test_why_no_gradient_can_flow(way, reason):
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(NotApplicable, match=reason):
        receptive_field.measure(Frozen(way), x, layers=["blocks.0", "blocks.2"])


@pytest.mark.parametrize("way", ["detach", "own leaf"])
def test_layers_without_a_gradient_are_left_out_and_named(way, capsys):
    net, x = Frozen(way), torch.randn(4, 3, 8, 8)
    result = receptive_field.measure(net, x, layers="blocks", channels="all")
    plain = receptive_field.measure(net.blocks[0], x, layers=["1"], channels="all")
    assert result.layers.tolist() == ["blocks.0"]
    np.testing.assert_allclose(result.gradient[0], plain.gradient[0], rtol=1e-5, atol=1e-9)
    assert "layer blocks.1 of Frozen to the image: something before it is detached" in (
        capsys.readouterr().err
    )
    assert "No gradient in Frozen: 2 layers, the first blocks.1" in result._caption()
    with pytest.raises(NotApplicable, match=r"layer blocks\.2 of Frozen"):
        receptive_field.measure(net, x, layers=["blocks.2"])


def test_a_decoding_process_that_ends_meanwhile_is_no_fault_of_the_model(monkeypatch):
    def ends(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(receptive_field, "rows_of_jacobian", ends)
    with pytest.raises(VitprobeError, match="ended a process that decodes images"):
        receptive_field.measure(Frozen("none"), torch.randn(4, 3, 8, 8), layers=["blocks.0"])


class Recomputed(nn.Module):
    """Blocks that are computed again for their gradients."""

    def __init__(self, recompute):
        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.recompute else block(x)
        return x


def test_recomputed_blocks_have_the_plain_gradients():
    x = torch.randn(3, 3, 8, 8)
    fields = [
        receptive_field.measure(Recomputed(again), x, layers=["blocks.*"], channels="all").gradient
        for again in (False, True)
    ]
    assert fields[0].any()
    np.testing.assert_array_equal(*fields)


def norm(affine=True, statistics=True):
    torch.manual_seed(0)
    one = nn.BatchNorm2d(4, affine=affine, track_running_stats=statistics).double().eval()
    for tensor in (*one.parameters(), *one.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1
    return one.requires_grad_(False)


def gradients(one, x, fast):
    x = x.clone().requires_grad_()
    if fast:
        with FastNorms():
            y = one(x)
    else:
        y = one(x)
    (gradient,) = torch.autograd.grad(y, x, torch.linspace(-1, 2, y.numel()).view_as(y).to(y))
    return y, gradient


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_with_running_statistics_has_its_own_gradient_only_faster(affine):
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    (plain, expected), (fast, gradient) = (gradients(norm(affine), x, one) for one in (False, True))
    torch.testing.assert_close(fast, plain, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert "FixedStatistics" in fast.grad_fn.name()


@pytest.mark.parametrize("kind", ["statistics of the batch", "a weight made from the image"])
def test_a_norm_that_depends_on_more_than_its_input_is_left_alone(kind):
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    if kind == "statistics of the batch":
        one = norm(statistics=False)
    else:
        mean, var = torch.zeros(4).double(), torch.ones(4).double()

        def one(x):
            return functional.batch_norm(x, mean, var, weight=x.mean((0, 2, 3)))

    (_, expected), (fast, gradient) = (gradients(one, x, fast) for fast in (False, True))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert "FixedStatistics" not in fast.grad_fn.name()
