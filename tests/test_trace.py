"""The observer of forward passes: what it recognises as residual, and what its hooks may change."""

from collections import Counter
from itertools import pairwise

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from vitprobe.tracing.trace import AdditionHooks, record, unobserved


@pytest.fixture(autouse=True)
def _seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """x and f(x), joined by ``join(x, f(x))``; ``leading`` runs on x before both."""

    def __init__(self, join, leading=None, shortcut=None):
        super().__init__()
        self.join = join
        self.leading = leading or nn.Identity()
        self.shortcut = shortcut or nn.Identity()
        self.f = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x):
        x = self.leading(x)
        return self.join(self.shortcut(x), self.f(x))


class WithTable(nn.Module):
    """A position table added to the tokens, then the block."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 5, 6))
        self.block = Block(lambda skip, branch: skip + branch)

    def forward(self, x):
        return self.block(x + self.table.expand(len(x), -1, -1))


class LeafGate(nn.Module):
    """Adds its own input, as response normalisation does, but has no children."""

    def forward(self, x):
        return x + x * x.mean(-1, keepdim=True)


class TwoBranches(nn.Module):
    """Parallel branches with as many weights on either side, as RepVGG has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) + self.b(x)


class Scales(nn.Module):
    """Sums one part of a tensor and what is made of another, as Res2Net and its like do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.f = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))

    def forward(self, x):
        one, other = self.first(x).chunk(2, -1)
        return self.f(one) + other


class Fusion(nn.Module):
    """Sums projections of a block's input and of its output, as NASNet's cells do."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, earlier):
            return self.near(x) + self.far(earlier)

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
        self.cell = self.Cell()

    def forward(self, x):
        return self.cell(self.f(x), x)


class ScaledPooling(nn.Module):
    """A scaled skip beside a branch without weights, as MetaFormer's pooling has it."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.scale + F.avg_pool1d(self.norm(x).mT, 3, 1, 1).mT


class Slices(nn.Module):
    """Writes the branch into a part of the input through a view of it."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))

    def forward(self, x):
        x = x.clone()
        part = x[:, 1:]
        part += self.f(part)
        return x + self.f(x)


def gate(skip, branch):
    return skip * branch.sigmoid()


@pytest.mark.parametrize(
    "model, expected",
    [
        (Block(lambda skip, branch: skip + branch), [("identity", 0)]),
        (Block(lambda skip, branch: branch + skip), [("identity", 1)]),
        (Block(lambda skip, branch: branch.add_(skip)), [("identity", 1)]),
        (Block(lambda skip, branch: torch.add(skip, other=branch)), [("identity", 0)]),
        (Block(lambda skip, branch: skip + 0.1 * branch), [("identity", 0)]),
        (Block(lambda skip, branch: skip + branch, leading=nn.ReLU(True)), [("identity", 0)]),
        (Block(lambda skip, branch: 0.5 * skip + branch), [("view", 0)]),
        (Block(lambda skip, branch: branch + skip.flip(1)), [("view", 1)]),
        (Block(lambda skip, branch: skip + branch, shortcut=nn.Linear(6, 6)), [("projection", 0)]),
        (
            Block(lambda skip, branch: skip + branch, nn.LayerNorm(6), nn.Linear(6, 6)),
            [("projection", 0)],
        ),
        (Block(lambda skip, branch: skip + branch, nn.Linear(6, 6), nn.Linear(6, 6)), []),
        (Block(gate), []),
        (Block(lambda skip, branch: branch + 1.0), []),
        (WithTable(), [("identity", 0)]),
        (nn.Sequential(LeafGate()), []),
        (TwoBranches(), []),
        (Scales(), []),
        (Fusion(), []),
        (ScaledPooling(), [("view", 0)]),
        (Slices(), [("identity", 0), ("identity", 0)]),
    ],
)
def test_additions_of_small_networks(model, expected):
    trace = record(model, torch.randn(2, 5, 6))
    assert [(a.kind, a.skip) for a in trace.additions] == expected


def has_skip(model):
    return sum(getattr(module, "has_skip", False) for module in model.modules())


@pytest.mark.parametrize(
    "name, size, kinds",
    [
        ("vit_tiny_patch16_224", 32, {"identity": 24}),
        ("swin_tiny_patch4_window7_224", 32, {"identity": 24}),
        ("mixer_s16_224", 32, {"identity": 16}),
        ("resnet18", 32, {"identity": 5, "projection": 3}),
        ("resnet50", 32, {"identity": 12, "projection": 4}),
        ("resnetv2_50x1_bit", 32, {"identity": 12, "projection": 4}),
        ("seresnet50", 32, {"identity": 12, "projection": 4}),
        ("convnext_atto", 32, {"identity": 12}),
        ("convnextv2_atto", 32, {"identity": 12}),  # as many additions in GRN do not count
        ("efficientnet_b0", 64, {"identity": 9}),
        ("mobilevit_xxs", 64, {"identity": 21}),
        ("beit_base_patch16_224", 32, {"identity": 24}),
        ("deit_tiny_distilled_patch16_224", 32, {"identity": 24}),
        # The first class token is a parameter, not yet a representation of the image.
        ("cait_xxs24_224", 32, {"identity": 2 * 26 - 1}),
        ("poolformer_s12", 64, {"identity": 24}),
        ("poolformerv2_s12", 64, {"identity": 8, "view": 16}),  # scaled skips in 8 of 12 blocks
    ],
)
def test_additions_of_published_architectures(name, size, kinds):
    try:
        model = timm.create_model(name, img_size=size)
    except TypeError:  # convolutional networks take any size
        model = timm.create_model(name)
    additions = record(model.eval(), torch.randn(1, 3, size, size)).additions
    assert Counter(a.kind for a in additions) == kinds
    if name == "efficientnet_b0":
        assert len(additions) == has_skip(model)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_maxvit"])
def test_the_branch_is_what_drop_path_returns(name):
    model = timm.create_model(name, drop_path_rate=0.2).eval()
    x = torch.randn(1, 3, *model.default_cfg["input_size"][1:])
    dropped, agrees = [], []
    for module in model.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(lambda _m, _x, y: dropped.append(y.data_ptr()))

    def compare(skip, branch):
        agrees.append(branch.data_ptr() in dropped and skip.data_ptr() not in dropped)
        dropped.clear()

    additions = record(model, x).additions
    dropped.clear()
    with torch.no_grad(), AdditionHooks(model, {a: compare for a in additions}):
        model(x)
    # The first block's rate is 0, and timm then builds no DropPath for it.
    assert sum(agrees) == sum(isinstance(module, DropPath) for module in model.modules())


def test_attention_is_told_from_the_mlp():
    trace = record(timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160))
    assert trace.attention_modules == [f"blocks.{i}.attn" for i in range(6)]
    assert [a.attends for a in trace.additions] == [True, False] * 6
    assert "blocks.0.attn.qkv" in trace.additions[0].branch_modules
    assert "blocks.0.mlp.fc1" in trace.additions[1].branch_modules
    assert {a.module for a in trace.additions} == {f"blocks.{i}" for i in range(6)}


def test_attention_inside_torch_and_by_softmax():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    trace = record(layer, torch.randn(1, 5, 6))
    assert trace.attention_modules == ["self_attn"]
    assert [a.attends for a in trace.additions] == [True, False]

    class Softmaxes(nn.Module):
        def __init__(self, scores):
            super().__init__()
            self.scores = scores

        def forward(self, x):
            return self.scores(x)

    def found(scores):
        return record(Softmaxes(scores), torch.randn(2, 5, 6)).attention_modules

    assert found(lambda x: (x @ x.mT).softmax(-1)) == [""]
    assert found(lambda x: F.softmax(x @ x.mT, dim=2)) == [""]
    assert found(lambda x: (x @ x.mT).softmax(1)) == []  # over queries
    assert found(lambda x: x.mean(1).softmax(-1)) == []  # class scores
    assert found(lambda x: x.mean(1, keepdim=True).softmax(-1)) == []  # pooling weights
    assert found(lambda x: x + torch.ones(5, 5, 5).softmax(-1).sum()) == []  # no input in it


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, extra=None):
        first = self.a(x)
        second = self.relu(self.b(self.relu(first)))
        return {"maps": [second, second.view(-1)], "extra": extra, "ones": torch.ones(3)}


def test_calls_in_order_with_names_indices_and_contained_tensors():
    seen = []
    trace = record(
        Shared(),
        torch.randn(2, 4),
        extra=torch.randn(3),
        on_output=lambda call, suffix, tensor: seen.append((call.name, suffix, tensor.shape)),
    )
    order = [(call.name, call.index) for call in trace.calls]
    assert order == [("a", 0), ("relu", 0), ("b", 0), ("relu", 1), ("", 0)]
    root, leaves = trace.calls[-1], trace.calls[:-1]
    assert [leaf.is_leaf for leaf in leaves] == [True] * 4 and not root.is_leaf
    assert root.type_name == "Shared"
    for before, after in pairwise(leaves):
        assert before.finished < after.started
    assert root.started < leaves[0].started and leaves[-1].finished < root.finished
    assert [suffix for suffix, _ in root.inputs] == ["[0]", "['extra']"]
    suffixes = ["['maps'][0]", "['maps'][1]", "['extra']", "['ones']"]
    assert [suffix for suffix, _ in root.outputs] == suffixes
    assert [info.depends for _, info in root.outputs] == [True, True, True, False]
    assert [entry[:2] for entry in seen[-4:]] == [("", suffix) for suffix in suffixes]
    assert seen[0] == ("a", "", (2, 4))


def test_identity_is_shared_by_equal_values_only():
    trace = record(Shared(), torch.randn(2, 4))
    identity = {
        (c.name, c.index, suffix): i.identity for c in trace.calls for suffix, i in c.outputs
    }
    maps = identity["", 0, "['maps'][0]"]
    assert identity["relu", 1, ""] == maps == identity["", 0, "['maps'][1]"]
    assert identity["a", 0, ""] != identity["relu", 0, ""]  # rewritten in place
    assert len({key for key in identity.values()}) == 5

    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Dropout(0.5), nn.Flatten(), nn.GELU())
    trace = record(model.eval(), torch.randn(2, 4))
    keys = [call.outputs[0][1].identity for call in trace.calls]
    assert len(set(keys[:4])) == 1 and keys[4] == keys[5] != keys[0]


def test_record_changes_nothing():
    model = timm.create_model("test_resnet").train()
    x = torch.randn(2, 3, 64, 64)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    record(model, x)
    assert model.training and torch.is_grad_enabled() and x.grad_fn is None
    with torch.inference_mode():
        assert len(record(model, torch.randn(2, 3, 64, 64)).additions) == 4
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


# --- hooks on the operands


@pytest.mark.parametrize(
    "join", [lambda s, b: s + b, lambda s, b: b.add_(s), lambda s, b: torch.add(s, b, alpha=2)]
)
def test_branches_alone_equal_the_network_without_skips(join):
    net = nn.Sequential(Block(join), Block(join, shortcut=nn.Linear(6, 6)), Block(join))
    x = torch.randn(3, 5, 6)
    additions = record(net, x[:1]).additions
    with torch.no_grad(), AdditionHooks(net, {a: lambda skip, branch: branch for a in additions}):
        ablated = net(x)
    with torch.no_grad():
        alone, scale = x, torch.add(torch.zeros(1), torch.ones(1), alpha=1)
        for block in net:
            scale = block.join(torch.zeros(1), torch.ones(1))
            alone = scale * block.f(alone)
    assert torch.equal(ablated, alone)


def test_ablated_vit_block_equals_the_rewritten_one():
    model = timm.create_model("test_vit").eval()
    x = torch.randn(2, 3, 160, 160)
    attention, mlp = [a for a in record(model, x[:1]).additions if a.module == "blocks.2"]
    assert attention.attends and not mlp.attends

    def ablated(chosen):
        with torch.no_grad(), AdditionHooks(model, {a: lambda _, branch: branch for a in chosen}):
            return model(x)

    def rewritten(keep_attention_skip, keep_mlp_skip):
        block = model.blocks[2]

        def forward(x, **_):
            x = keep_attention_skip * x + block.attn(block.norm1(x))
            return keep_mlp_skip * x + block.mlp(block.norm2(x))

        block.forward = forward
        try:
            with torch.no_grad():
                return model(x)
        finally:
            del block.forward

    assert torch.equal(ablated([attention]), rewritten(0, 1))
    assert torch.equal(ablated([mlp]), rewritten(1, 0))
    assert torch.equal(ablated([attention, mlp]), rewritten(0, 0))
    assert torch.equal(ablated([]), rewritten(1, 1))


def test_operands_are_seen_before_an_in_place_addition():
    model = Block(lambda skip, branch: branch.add_(skip))
    x = torch.randn(2, 5, 6)
    (addition,) = record(model, x).additions
    seen = {}
    with torch.no_grad():
        expected = model.f(x)
        with AdditionHooks(
            model,
            before={addition: lambda skip, branch: seen.update(skip=skip + 0, branch=branch + 0)},
            after={addition: lambda total: seen.update(total=total + 0)},
        ):
            out = model(x)
    assert torch.equal(seen["skip"], x) and torch.equal(seen["branch"], expected)
    assert torch.equal(seen["total"], out) and torch.equal(out, x + expected)


def test_a_stand_in_lands_where_an_in_place_addition_would_write():
    class Discards(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(6, 6)

        def forward(self, x):
            y = self.f(x)
            y.add_(x)  # its result is not used by name
            return y

    model, x = Discards(), torch.randn(2, 6)
    (addition,) = record(model, x).additions
    with torch.no_grad(), AdditionHooks(model, {addition: lambda skip, branch: skip * 3}):
        assert torch.equal(model(x), x * 3)


@pytest.mark.parametrize("setting", ["no_grad", "inference", "autograd", "autocast"])
@pytest.mark.parametrize("name, size", [("test_vit", 160), ("test_resnet", 64)])
def test_hooks_work_in_every_setting(name, size, setting):
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, size, size)
    additions = record(model, x[:1]).additions
    context = {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autograd": torch.enable_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }[setting]
    shapes = []
    with context:
        expected = model(x)
        with AdditionHooks(model, {a: lambda s, b: shapes.append(s.shape) for a in additions}):
            out = model(x)
            model(x)  # each pass counts anew
        last = additions[-1]
        with AdditionHooks(model, {last: lambda s, b: b}, {last: lambda y: shapes.append(y.dtype)}):
            ablated = model(x)
    assert torch.equal(out, expected) and not torch.equal(ablated, expected)
    assert shapes[:-1] == [(2, *a.shape[1:]) for a in additions] * 2
    assert shapes[-1] == torch.float32 or setting == "autocast"
    if setting == "autograd":
        ablated.sum().backward()
        assert next(model.parameters()).grad is not None


def test_wrong_passes_are_told():
    net = nn.Sequential(Block(lambda s, b: s + b), Block(lambda s, b: s + b))
    x = torch.randn(2, 5, 6)
    first, second = record(net, x).additions

    def nothing(skip, branch):
        return None

    def attempt(model, x, hooks):
        with AdditionHooks(model, hooks):
            if x is not None:
                model(x)

    with pytest.raises(RuntimeError, match=r"no complete forward pass .* '1'"):
        attempt(net, None, {second: nothing})
    with pytest.raises(RuntimeError, match=r"'0': the pass made 1 additions, the recorded one 2"):
        attempt(net[0], x, {first: nothing})
    with pytest.raises(RuntimeError, match=r"'0' was recorded with shape \(2, 5, 6\)"):
        attempt(net, x[0], {first: nothing})
    with pytest.raises(ValueError, match=r"stand-in for the sum of '1' has shape \(2, 5\)"):
        attempt(net, x, {second: lambda skip, branch: branch[..., 0]})
    handle = net[0].register_forward_hook(lambda m, args, y: (y + y).sum() and None)
    with pytest.raises(RuntimeError, match="made 3 additions"):
        attempt(net, x, {second: nothing})
    handle.remove()

    def quiet(module, args, output):
        with unobserved():
            (output + output).sum()

    net[0].register_forward_hook(quiet)
    attempt(net, x, {second: nothing})


def test_nothing_is_left_behind_after_an_exception():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("inside")

    net = nn.Sequential(Block(lambda s, b: s + b), Fails())
    x = torch.randn(2, 5, 6)
    (addition,) = record(net[0], x).additions
    with pytest.raises(KeyError, match="inside"):
        record(net, x)
    with pytest.raises(KeyError, match="inside"), AdditionHooks(net, {addition: lambda s, b: None}):
        net(x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.overrides._get_current_function_mode() is None
