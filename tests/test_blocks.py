"""What a block is: told from what a pass does, on small networks written in many ways."""

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.trace import record


def blocks(module, side=32):
    torch.manual_seed(0)
    return [
        layer.label
        for layer in map_layers("net", module.eval(), torch.randn(2, 3, side, side)).choose(
            "blocks"
        )
    ]


def kinds(module, *inputs):
    return [(a.module, a.kind, a.skip) for a in record(module.eval(), *inputs).additions]


def mlp(width=8):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT).softmax(-1)
        return scores @ v, scores


class Block(nn.Module):
    """Returns its attention map beside the tokens, after or before them."""

    def __init__(self, order="tokens first"):
        super().__init__()
        self.attention, self.mlp, self.order = Attention(), mlp(), order

    def forward(self, x):
        out, scores = self.attention(x)
        x = x + out
        x = x + self.mlp(x)
        return {"tokens first": (x, scores), "map first": (scores, x), "plain": x}[self.order]


class Tokens(nn.Module):
    """Patches through a body, then a norm."""

    def __init__(self, body):
        super().__init__()
        self.patch, self.body, self.norm = nn.Conv2d(3, 8, 8, 8), body, nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.body(self.patch(x).flatten(2).mT))


class Chain(nn.Module):
    def __init__(self, *blocks, of=0):
        super().__init__()
        self.blocks, self.of = nn.ModuleList(blocks), of

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[self.of] if isinstance(x, tuple) else x
        return x


class Loop(nn.Module):
    """Adds in its own loop; pairs of branches in a list each."""

    def __init__(self, depth=3, parallel=False):
        super().__init__()
        self.pairs = nn.ModuleList([nn.ModuleList([Attention(), mlp()]) for _ in range(depth)])
        self.parallel = parallel

    def forward(self, x):
        for attention, feed in self.pairs:
            if self.parallel:
                x = x + attention(x)[0] + feed(x)
            else:
                x = attention(x)[0] + x
                x = feed(x) + x
        return x


class FlatLoop(nn.Module):
    """The same with all branches in one list."""

    def __init__(self, depth=3):
        super().__init__()
        self.parts = nn.ModuleList([part for _ in range(depth) for part in (Attention(), mlp())])

    def forward(self, x):
        for part in self.parts:
            branch = part(x)
            x = x + (branch[0] if isinstance(branch, tuple) else branch)
        return x


class LoopOfPlus(nn.Module):
    """Each branch with a module that adds it, in a list."""

    def __init__(self, depth=3):
        super().__init__()
        self.units = nn.ModuleList([nn.ModuleList([mlp(), Plus()]) for _ in range(depth)])

    def forward(self, x):
        for branch, plus in self.units:
            x = plus(x, branch(x))
        return x


class TwoMLPs(nn.Module):
    """Token mixing and channel mixing: two branches of one class in one block."""

    def __init__(self):
        super().__init__()
        self.tokens, self.channels = mlp(16), mlp(8)

    def forward(self, x):
        x = x + self.tokens(x.mT).mT
        return x + self.channels(x)


class Plus(nn.Module):
    def forward(self, *given):
        return given[0] + given[1]


class Apart(nn.Module):
    """A residual addition in a module of its own, which has no parts."""

    def __init__(self, shortcut=None):
        super().__init__()
        self.f, self.plus, self.shortcut = mlp(), Plus(), shortcut or nn.Identity()

    def forward(self, x):
        return self.plus(self.shortcut(x), self.f(x))


class Output(nn.Module):
    """As BERT has it: the second half of a branch, the addition and a norm in one module."""

    def __init__(self, inner):
        super().__init__()
        self.dense, self.norm = nn.Linear(inner, 8), nn.LayerNorm(8)

    def forward(self, hidden, x):
        return self.norm(self.dense(hidden) + x)


class PostNorm(nn.Module):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.output = Attention(), Output(8)

        def forward(self, x):
            return self.output(self.inner(x)[0], x)

    def __init__(self):
        super().__init__()
        self.attends, self.dense, self.output = self.Attends(), nn.Linear(8, 12), Output(12)

    def forward(self, x):
        x = self.attends(x)
        return self.output(self.dense(x).relu(), x)


class Encoded(nn.Module):
    """A position encoding that adds for itself, before attention."""

    class Encoding(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.f(x.mT).mT

    def __init__(self):
        super().__init__()
        self.encoding, self.attention = self.Encoding(), Attention()

    def forward(self, x):
        x = self.encoding(x)
        return x + self.attention(x)[0]


class Skipped(nn.Module):
    """A skip over a whole row of blocks."""

    def __init__(self):
        super().__init__()
        self.row = Chain(*(Block("plain") for _ in range(3)))

    def forward(self, x):
        return x + self.row(x)


class Head(nn.Module):
    """Sums over a query of its own, with an addition; no block."""

    def __init__(self):
        super().__init__()
        self.f = mlp()

    def forward(self, x):
        x = x.mean(1, keepdim=True)
        return x + self.f(x)


def numbered(name, number, end=""):
    return [f"{name}.{i}{end}" for i in range(number)]


TOKENS = {
    "map beside": (Chain(*(Block() for _ in range(3))), numbered("body.blocks", 3, "[0]")),
    "map in front": (
        Chain(*(Block("map first") for _ in range(3)), of=1),
        numbered("body.blocks", 3, "[1]"),
    ),
    "loop over pairs": (Loop(), [f"body sum {2 * i + 2}" for i in range(3)]),
    "loop of parallel branches": (Loop(parallel=True), [f"body sum {2 * i + 2}" for i in range(3)]),
    "loop over one list": (FlatLoop(), [f"body sum {2 * i + 2}" for i in range(3)]),
    "loop with modules that add": (LoopOfPlus(), [f"body sum {i}" for i in (1, 2, 3)]),
    "loops in a row": (
        Chain(Loop(2), Loop(2)),
        [f"body.blocks.{i} sum {j}" for i in range(2) for j in (2, 4)],
    ),
    "two branches of one class": (
        Chain(TwoMLPs(), TwoMLPs(), TwoMLPs()),
        numbered("body.blocks", 3),
    ),
    "additions in modules of their own": (
        Chain(*(Apart() for _ in range(3))),
        numbered("body.blocks", 3),
    ),
    "halves of branches": (Chain(*(PostNorm() for _ in range(3))), numbered("body.blocks", 3)),
    "an encoding that adds": (Chain(*(Encoded() for _ in range(3))), numbered("body.blocks", 3)),
    "a skip over all": (Skipped(), numbered("body.row.blocks", 3)),
    "a head that adds": (
        nn.Sequential(Chain(*(Block("plain") for _ in range(3))), Head()),
        numbered("body.0.blocks", 3),
    ),
}


@pytest.mark.parametrize("way", TOKENS)
def test_blocks_of_tokens(way):
    body, expected = TOKENS[way]
    assert blocks(Tokens(body)) == expected


class Bottleneck(nn.Module):
    def __init__(self, width, out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 6, 3, stride, 1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(6, out, 3, 1, 1), nn.BatchNorm2d(out)
        changes = stride > 1 or width != out
        self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride)) if changes else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.down is None else self.down(x)))


class Mobile(nn.Module):
    """A skip only where the shape stays."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.skip = stride == 1 and width == out
        self.f = nn.Sequential(nn.Conv2d(width, 12, 1), nn.ReLU(), nn.Conv2d(12, out, 3, stride, 1))

    def forward(self, x):
        return x + self.f(x) if self.skip else self.f(x)


class Separable(nn.Module):
    def __init__(self, width, out, stride=1):
        super().__init__()
        self.depth = nn.Conv2d(width, width, 3, stride, 1, groups=width)
        self.point = nn.Conv2d(width, out, 1)

    def forward(self, x):
        return self.point(self.depth(x).relu()).relu()


class Dense(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, 8, 1), nn.Conv2d(8, 4, 3, 1, 1)

    def forward(self, x):
        return torch.cat([x, self.two(self.one(x).relu())], 1)


class Branches(nn.Module):
    """Inception: each branch is a row of convolutions of its own."""

    def __init__(self, width):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1))

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


def stem(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


def head(width):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def resnet():
    return nn.Sequential(
        stem(),
        nn.Sequential(Bottleneck(8, 8), Bottleneck(8, 8)),
        nn.Sequential(Bottleneck(8, 16, 2), Bottleneck(16, 16)),
        head(16),
    )


MAPS = {
    # Stem, reduction and blocks share a pattern of names: "*.*".
    "stems and reductions": (
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8)),
            nn.Sequential(Bottleneck(8, 8), Bottleneck(8, 8)),
            nn.Sequential(nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 2, 2)),
            nn.Sequential(Bottleneck(16, 16)),
        ),
        ["1.0", "1.1", "3.0"],
    ),
    "strided blocks without a skip": (
        nn.Sequential(
            stem(), Mobile(8, 8, 1), Mobile(8, 16, 2), Mobile(16, 16, 1), Mobile(16, 24, 2),
            nn.Sequential(nn.Conv2d(24, 32, 1), nn.ReLU()), head(32),
        ),
        ["1", "2", "3", "4"],
    ),
    "a strided one of another class": (
        nn.Sequential(stem(), Separable(8, 8), Mobile(8, 8, 1), Mobile(8, 8, 1), head(8)),
        ["1", "2", "3"],
    ),
    "strided ones elsewhere, a head of their class": (
        nn.Sequential(stem(), nn.Sequential(Mobile(8, 8, 1), Mobile(8, 8, 1)), Mobile(8, 16, 2),
                      nn.Sequential(Mobile(16, 16, 1)), Mobile(16, 24, 2), head(24)),
        ["1.0", "1.1", "2", "3.0"],
    ),
    "depthwise, no skip": (
        nn.Sequential(stem(), nn.BatchNorm2d(8), *(Separable(8, 8) for _ in range(4)), head(8)),
        ["2", "3", "4", "5"],
    ),
    "concatenating": (
        nn.Sequential(stem(), nn.Sequential(Dense(8), Dense(12)), nn.Conv2d(16, 8, 1),
                      nn.Sequential(Dense(8), Dense(12), Dense(16)), head(20)),
        ["1.0", "1.1", "3.0", "3.1", "3.2"],
    ),
    "branches": (
        nn.Sequential(stem(), Branches(8), Branches(8), Branches(8), head(8)), ["1", "2", "3"]
    ),
    "plain": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5),
        ),
        ["1", "3", "6"],
    ),
    "residual": (resnet(), ["1.0", "1.1", "2.0", "2.1"]),
    "residual, flattened": (symbolic_trace(resnet()), [f"output sum {i}" for i in range(1, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("way", MAPS)
def test_blocks_of_maps(way):
    module, expected = MAPS[way]
    assert blocks(module) == expected


class Adapted(nn.Module):
    """Weights with a low-rank adapter beside them, scaled as a whole or not."""

    def __init__(self, scaled=False):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)
        self.scale = nn.Parameter(torch.rand(8)) if scaled else None

    def forward(self, x):
        out, added = self.base(x), self.up(self.down(x)) * 0.5
        return out + added if self.scale is None else out + ((self.scale - 1) * out + added)


class Reparametrised(nn.Module):
    """RepVGG's parallel branches, and one of two convolutions in a row."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.two = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        )
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return (self.one(x) + self.two(x) + self.norm(x)).relu()


@pytest.mark.parametrize("scaled", [False, True])
def test_an_adapter_beside_its_weights_is_no_branch(scaled):
    assert kinds(Adapted(scaled), torch.randn(2, 5, 8)) == []


def test_parallel_convolutions_are_no_branches():
    assert kinds(nn.Sequential(Reparametrised(), Reparametrised()), torch.randn(2, 8, 9, 9)) == []


def test_a_sum_in_a_module_of_its_own_belongs_to_the_caller():
    x = torch.randn(2, 5, 8)
    assert kinds(nn.Sequential(Apart()), x) == [("0", "identity", 0)]
    assert kinds(nn.Sequential(Apart(nn.Linear(8, 8))), x) == [("0", "projection", 0)]


def test_a_flattened_network_keeps_its_skips():
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    module = [(kind, skip) for _, kind, skip in kinds(model, x)]
    assert [kind for kind, _ in module] == ["identity", "identity", "projection", "identity"]
    assert [(kind, skip) for _, kind, skip in kinds(symbolic_trace(model), x)] == module


def test_parallel_branches_added_one_after_the_other_are_both_residual():
    assert kinds(Loop(1, parallel=True), torch.randn(2, 5, 8)) == [("", "identity", 0)] * 2
