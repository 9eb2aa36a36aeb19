"""Modules as people write them: what a pass does decides, however it is written."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn import functional as F

from vitprobe import VitprobeError, attention_rollout, cka, skip_ratio, wrap
from vitprobe.tracing.attention_map import map_attention
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.places import find_places
from vitprobe.tracing.positions import find_positions
from vitprobe.tracing.stem import stem_filters
from vitprobe.tracing.theoretical_field import theoretical_fields


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Tokens(nn.Module):
    """Patches of 8 px, something done to them, a head."""

    def __init__(self, how, width=8, **parts):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, width, 8, 8), nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)
        self.how = how
        self.table = nn.Parameter(torch.randn(1, 16, width))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.head(self.norm(self.how(self, self.patch(x).flatten(2).mT)))


def pair(channels=3, side=32):
    return torch.randn(2, channels, side, side)


# Places


def copied(net, x):
    """A class token and patches, each copied into a view of what was made before."""
    out = x.new_zeros(len(x), 17, 8)
    out[:, 1:].copy_(x)
    out[:, 0].copy_(net.table[0, :1].expand(len(x), -1))
    return out


def test_tokens_copied_into_parts_of_a_tensor_keep_their_places():
    net = Tokens(copied).eval()
    layers = map_layers("net", net, pair()).choose("norm")
    (places,) = find_places(net, layers, pair())
    assert places.order.tolist() == np.arange(1, 17).reshape(4, 4).tolist()
    assert places.without_place == (0,)


# Positions


def sines():
    steps = torch.arange(16)[:, None] * torch.linspace(0.1, 1, 8)
    return steps.sin()


def written(net, x):
    table = torch.zeros_like(x[:1])
    table[0] = sines()
    return x + table


@pytest.mark.parametrize(
    ("how", "table"),
    [
        (lambda net, x: x + sines().to(x), sines),
        (lambda net, x: x + sines().type_as(x), sines),
        (lambda net, x: x + sines().expand_as(x), sines),
        (written, sines),
        (lambda net, x: x - net.table, lambda net: -net.table[0]),
        (lambda net, x: torch.add(x, net.table, alpha=0.5), lambda net: 0.5 * net.table[0]),
    ],
)
def test_tables_are_what_is_added_whatever_lends_them_its_type(how, table):
    net = Tokens(how).eval()
    ((_, found),) = find_positions(net, pair()[:1]).tables
    expected = table(net) if table is not sines else sines()
    torch.testing.assert_close(found, expected.unflatten(0, (4, 4)).detach())


class Biased(nn.Module):
    """Attention with a bias of the offset, written in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.q, self.k, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way
        self.table = nn.Parameter(torch.randn(7, 7))
        y, x = np.divmod(np.arange(16), 4)
        self.index = (y[None] - y[:, None] + 3) * 7 + x[None] - x[:, None] + 3

    def forward(self, x):
        q, k, bias = self.q(x)[:, None], self.k(x)[:, None], self.table.flatten()[self.index]
        if self.way == "subtracted":
            scores = (q @ k.mT - (-bias)).softmax(-1)
        elif self.way == "keys first":
            scores = (k @ q.mT + bias.mT).softmax(-2).mT
        elif self.way == "causal":
            later = torch.ones(16, 16).triu(1).bool()
            scores = (q @ k.mT + torch.zeros(16, 16).masked_fill(later, -1e9)).softmax(-1)
        return x + (scores @ x[:, None])[:, 0]


@pytest.mark.parametrize("way", ["subtracted", "keys first"])
def test_biases_by_offset_from_query_to_key_however_they_are_written(way):
    attention = Biased(way)
    net = Tokens(lambda net, x: attention(x), attention=attention).eval()
    ((name, found),) = find_positions(net, pair()[:1]).biases
    assert name == "attention"
    np.testing.assert_allclose(found[0], attention.table.detach(), atol=1e-6)


def test_a_causal_mask_is_no_bias():
    attention = Biased("causal")
    net = Tokens(lambda net, x: attention(x), attention=attention).eval()
    assert find_positions(net, pair()[:1]).biases == []


class Patches(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(192, 5)), how

    def forward(self, x):
        return self.how(F.unfold(x, 8, stride=8), self.weight)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, w: x.mT @ w,
        lambda x, w: (w.T @ x).mT,
        lambda x, w: x.mT @ w[None],
        lambda x, w: torch.einsum("...pn,pd->...nd", x, w),
        lambda x, w: torch.tensordot(x.mT, w, 1),
        lambda x, w: torch.tensordot(w, x, ([0], [1])).transpose(0, 1).mT,
        lambda x, w: torch.addmm(torch.zeros(5), x.mT.flatten(0, 1), w).unflatten(0, (len(x), -1)),
    ],
)
def test_filters_are_the_weights_that_meet_pixels_in_any_product(how):
    net = Patches(how)
    _, filters = stem_filters(net, pair()[:1])
    expected = net.weight.detach().T.reshape(5, 3, 8, 8).permute(0, 2, 3, 1)
    torch.testing.assert_close(filters, expected)


# Rows


@pytest.mark.parametrize(
    "how",
    [
        lambda net, x: x * (torch.rand(len(x), 1, 1) > 0.5),
        lambda net, x: x + net.table * int(torch.rand(()) > 0.7),
        lambda net, x: x[torch.randperm(len(x))],
        lambda net, x: x + net.table * int(np.random.rand() > 0.6),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_pass_that_draws_is_found_random_though_it_may_draw_the_same_twice(how, seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    with pytest.raises(VitprobeError, match=r"the pass is random|see each other"):
        map_layers("net", Tokens(how).eval(), pair())


def test_a_pass_that_draws_and_does_not_use_it_is_not_random():
    def how(net, x):
        return x * (torch.rand(len(x), 1, 1) > -1)

    assert map_layers("net", Tokens(how).eval(), pair()).choose("norm")


def test_images_that_share_their_largest_value_are_told():
    net = nn.Sequential(nn.Identity(), Tokens(lambda net, x: x), nn.Tanh()).eval()
    net[0].forward = lambda x: x / x.abs().amax()
    with pytest.raises(VitprobeError, match="see each other in net"):
        map_layers("net", net, pair())


def test_a_model_may_check_the_range_of_its_images():
    def checked(x):
        assert x.abs().amax() <= 1
        return x

    net = nn.Sequential(nn.Identity(), Tokens(lambda net, x: x)).eval()
    net[0].forward = checked
    assert map_layers("net", net, pair().tanh()).choose("1.norm")


# Blocks and additions


def branch(width, out, stride=1):
    return nn.Sequential(
        nn.Conv2d(width, 12, 1), nn.ReLU(), nn.Conv2d(12, out, 3, stride, 1), nn.BatchNorm2d(out)
    )


class Strided(nn.Module):
    """A loop that adds where the shape stays, and takes strided units as they are."""

    def __init__(self, stem=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.units = nn.ModuleList(
            [branch(8, 8), branch(8, 16, 2), branch(16, 16), branch(16, 16), branch(16, 24, 2)]
        )
        self.adds = [True, False, True, True, False]

    def forward(self, x):
        x = self.stem(x)
        for unit, adds in zip(self.units, self.adds):
            x = x + unit(x) if adds else unit(x)
        return x.mean((2, 3))


def blocks(module):
    return [one.label for one in map_layers("net", module.eval(), pair()).choose("blocks")]


def test_strided_units_of_a_loop_are_blocks_too_and_of_a_flattened_network():
    expected = ["output sum 1", "units.1", "output sum 2", "output sum 3", "units.4"]
    assert blocks(Strided()) == expected
    flat = [name.replace("units.1", "units.1.3").replace("4", "4.3") for name in expected]
    assert blocks(symbolic_trace(Strided())) == flat


class Functional(nn.Module):
    """A bottleneck whose activations are functions."""

    def __init__(self, before=False):
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(
            16, 16, 3, 1, 1
        )  # fmt: skip
        self.down, self.before = nn.Conv2d(8, 16, 1, 2), before

    def forward(self, x):
        if self.before:
            x = F.relu(self.norm(x))
        return F.relu(self.down(x) + self.two(F.relu(self.one(x))))


@pytest.mark.parametrize("before", [False, True])
def test_a_flattened_network_keeps_its_projections_between_functions(before):
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
    net = nn.Sequential(stem, Functional(before)).eval()
    for module in (net, symbolic_trace(net)):
        (addition,) = map_layers("net", module, pair()).trace.additions
        assert (addition.kind, addition.skip) == ("projection", 0)


def test_networks_side_by_side_whose_outputs_are_added_make_no_skip():
    def net(depth):
        layers = [part for _ in range(depth) for part in (nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *layers)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = net(1), net(2)

        def forward(self, x):
            return self.a(x) + self.b(x)

    assert map_layers("net", Both().eval(), pair()).trace.additions == []


def test_one_layer_with_weights_is_the_block():
    assert blocks(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))) == ["1"]


# Attention


class Heads(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.qkv, self.out, self.way = nn.Linear(8, 24), nn.Linear(8, 8), way

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.way == "one by one":
            each = [F.scaled_dot_product_attention(q[:, h], k[:, h], v[:, h]) for h in (0, 1)]
            y = torch.stack(each, 1)
        elif self.way == "linear":
            y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_linear_attention_is_attention_that_cannot_be_read():
    attention = Heads("linear")
    net = Tokens(lambda net, x: x + attention(x), attention=attention).eval()
    found = map_attention("net", net, pair())
    with pytest.raises(VitprobeError, match="net attends, if at all, in a way that cannot be read"):
        found.require("attention distance")


@pytest.mark.parametrize("way", ["one by one", "parallel"])
def test_what_attends_side_by_side_has_no_rollout(way):
    first, second = Heads(way), Heads(way)

    def how(net, x):
        return x + first(x) + second(x) if way == "parallel" else x + first(x)

    net = Tokens(how, first=first, second=second)
    with pytest.raises(VitprobeError, match="attend side by side, not one after the other"):
        attention_rollout.measure(wrap(net, "net"), pair(), quiet=True)


# Theoretical fields


class Folded(nn.Module):
    """Windows of 2 × 2 patches in the batch; the channels of one are then copied from a shift."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.last = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Identity()

    def forward(self, x):
        x = self.patch(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        x = self.norm(x)
        x = x.reshape(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
        y = x.clone()
        y[:, 1:, :, :2].copy_(x[:, :-1, :, :2])
        return self.last(y)


def test_windows_in_the_batch_and_copied_parts_have_the_fields_of_their_pixels():
    net, x = Folded().eval(), pair()
    layers = map_layers("net", net, x).choose(["norm", "last"])
    boxes = theoretical_fields(net, layers, [(4, 5)] * 2, x[:1])
    assert boxes == [(16, 20, 19, 23), (12, 20, 19, 23)]


# Modules


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_scripted_parts_without_weights_are_passed_over(tensors):
    net = Tokens(lambda net, x: net.act(scripted(x)), act=torch.jit.script(nn.GELU()))
    assert np.isfinite(cka.measure(net, tensors, layers=["patch", "norm"]).cka).all()
    assert stem_filters(net, tensors[:1])[0] == "patch"
    assert find_positions(net, tensors[:1]).tables == []


def test_state_dicts_of_all_layouts_have_a_digest(tensors):
    net = Tokens(lambda net, x: x)
    plain = wrap(net).weights_sha256()
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    net.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
    net.register_buffer("empty", torch.empty(0))
    assert wrap(net).weights_sha256() != plain
    assert np.isfinite(cka.measure(net, tensors, layers=["patch", "norm"]).cka).all()


def test_weights_on_no_device_get_a_line(tensors):
    with torch.device("meta"):
        net = Tokens(lambda net, x: x)
    with pytest.raises(VitprobeError, match=r"table of Tokens has no numbers .*load weights first"):
        cka.measure(net, tensors)


class Answers(Tokens):
    """Hands out something under any name."""

    def __init__(self, how):
        super().__init__(how)
        self.ready = True

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "ready" not in vars(self):
                raise
            return lambda *args, **options: name


def test_modules_that_have_any_attribute_are_modules(tensors):
    net = Answers(lambda net, x: x)
    assert np.isfinite(cka.measure(net, tensors, layers=["patch", "norm"]).cka).all()


class Singly(Tokens):
    """Each image by itself, in a loop."""

    def forward(self, x):
        return torch.cat([super(Singly, self).forward(one[None]) for one in x])


def test_steps_that_depend_on_the_number_of_images_get_a_line(tensors):
    block = nn.Linear(8, 8)
    net = Singly(lambda net, x: x + block(x).relu(), block=block)
    with pytest.raises(VitprobeError, match=r"steps depend on its images, or on their number"):
        skip_ratio.measure(net, tensors)


def test_sharded_and_distributed_modules_have_the_numbers_of_the_plain_one(tensors):
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a process group of its own")
    sharding = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(sharding, "fully_shard") or torch.__version__.startswith("2.6"):
        pytest.skip("torch 2.6 shards on cards alone")

    def net():
        torch.manual_seed(0)
        return Tokens(lambda net, x: x + net.table)

    plain = cka.measure(net(), tensors, layers=["patch", "norm"], device="cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = sharding.fully_shard(net(), mesh=mesh)
        for module in (sharded, nn.parallel.DistributedDataParallel(net())):
            found = cka.measure(module, tensors, layers=["patch", "norm"], device="cpu")
            np.testing.assert_allclose(found.cka, plain.cka, atol=1e-6)
        digests = [wrap(one).weights_sha256() for one in (sharded, net())]
        assert digests[0] == digests[1]
    finally:
        dist.destroy_process_group()
