"""Anybody's module as they have it: in shells, in half precision, with a forward of its own."""

import copy
import functools
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import (
    VitprobeError,
    attention_distance,
    attention_rollout,
    cka,
    localization,
    receptive_field,
    skip_ratio,
    wrap,
)
from vitprobe.running.options import Options
from vitprobe.running.session import session
from vitprobe.tracing.failures import forward_failure


class Block(nn.Module):
    """A residual branch whose activation can be given."""

    def __init__(self, act=torch.relu):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(8, 12), nn.Linear(12, 8), act

    def forward(self, x):
        return x + self.two(self.act(self.one(x)))


class Net(nn.Module):
    """Patches, two residual blocks, a head; the same weights each time."""

    def __init__(self, act=torch.relu):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.Sequential(Block(act), Block(act))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patch(x).flatten(2).mT).mean(1))


def measured(module, images, **options):
    return cka.measure(module, images, layers=["patch", "blocks.*", "head"], **options)


# Shells


def test_compiled_and_data_parallel_modules_are_measured_as_what_is_inside(tensors):
    plain = measured(Net(), tensors)
    compiled = torch.compile(Net(), backend="eager")
    for shell in (
        compiled,
        nn.DataParallel(Net()),
        nn.DataParallel(compiled),
        wrap(Net(), "Net").__class__("Net", compiled),
    ):
        found = measured(shell, tensors)
        assert found.models == ["Net"] and list(found.layers) == list(plain.layers)
        np.testing.assert_array_equal(found.cka, plain.cka)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 has stances")
def test_compiled_parts_run_eagerly_while_they_are_watched(tensors):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = skip_ratio.measure(Net(), tensors, device="cpu")
    net = Net()
    net.blocks.compile(backend=backend)
    compiled_before = net(tensors)
    assert graphs
    count = len(graphs)
    found = skip_ratio.measure(net, tensors, device="cpu")
    np.testing.assert_array_equal(found.ratio, plain.ratio)
    assert len(graphs) == count
    # Afterwards it runs compiled, as before.
    torch.testing.assert_close(net(tensors), compiled_before)


class Adapter(nn.Module):
    """Hands on what it does not have itself, as adapters and sharding shells do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x):
        return self.base(x)


def test_adapters_keep_the_transform_of_the_timm_model_inside(pictures):
    base = timm.create_model("test_vit", img_size=64).eval()
    plain, adapted = wrap(base), wrap(Adapter(base))
    assert adapted.transform_key == plain.transform_key
    assert adapted.input_size == plain.input_size == (3, 64, 64)
    assert adapted.timm_name == "test_vit"
    found = [attention_distance.measure(one, pictures, workers=0) for one in (plain, adapted)]
    np.testing.assert_array_equal(found[1].distance_px, found[0].distance_px)


def test_programs_without_modules_get_a_line_that_says_so(tensors):
    net = Net().eval()
    with warnings.catch_warnings():
        # Newer releases of torch call it deprecated.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, tensors[:2])
    exported = torch.export.export(net, (tensors[:2],))
    around = nn.Sequential()
    around.add_module("encoder", traced)
    for module, message in [
        (traced, "is TorchScript"),
        (around, "Sequential.encoder is TorchScript"),
        (exported.module(), "is an exported program"),
        (exported, "not ExportedProgram. Give the module it was exported from"),
        (nn.Sequential(nn.LazyLinear(3)), "0.weight of Sequential has no shape yet"),
    ]:
        with pytest.raises(VitprobeError, match=message):
            cka.measure(module, tensors)


# Precision


class Clip(nn.Module):
    """CLIP's towers after its own conversion to half precision: the tables stay in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.class_embedding = nn.Parameter(torch.zeros(8))
        self.conv, self.block = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x).flatten(2).mT
        table = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return self.block(torch.cat([table, x], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_come_in_the_type_of_the_first_layer_that_sees_them(dtype, tensors):
    mixed = Clip()
    mixed.conv.to(dtype)
    mixed.block.to(dtype)
    late = Clip().to(dtype)
    late.conv.float()
    late.conv.register_forward_hook(lambda module, args, output: output.to(dtype))
    seen = []
    for module, wanted in ((mixed, dtype), (late, torch.float32), (Clip().double(), torch.float64)):
        with session(module, tensors, Options(device="cpu")) as ready:
            assert ready.example()[0].dtype == wanted
        module.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        result = cka.measure(module, tensors, layers=["conv", "block"], device="cpu")
        assert np.isfinite(result.cka).all() and seen[-1] == wanted
    whole = cka.measure(Clip(), tensors, layers=["conv", "block"], device="cpu").cka
    half = cka.measure(mixed, tensors, layers=["conv", "block"], device="cpu").cka
    np.testing.assert_allclose(half, whole, atol=0.02)


# The forward pass


class Keyword(Net):
    def forward(self, *, pixel_values, scale=1.0):
        return {"logits": super().forward(pixel_values * scale)}


class TwoInputs(Net):
    def forward(self, ids, images):
        return super().forward(images) + ids


class FromDict(Net):
    def forward(self, batch):
        return super().forward(batch["image"])


@pytest.mark.parametrize(
    ("kind", "forward", "named"),
    [
        (Keyword, lambda m, x: m(pixel_values=x), "pixel_values, scale"),
        (TwoInputs, lambda m, x: m(0, x), "ids, images"),
        (FromDict, lambda m, x: m({"image": x}), "batch"),
    ],
)
def test_a_forward_of_the_users_own(kind, forward, named, tensors):
    module = kind().train()
    module.blocks[0].eval()
    modes = [part.training for part in module.modules()]
    for measure in (cka.measure, skip_ratio.measure):
        with pytest.raises(VitprobeError, match=rf"it takes {named}\. .*forward=lambda m, x"):
            measure(module, tensors)
    model = wrap(module, forward=forward)
    assert model.name == kind.__name__
    plain, found = measured(Net(), tensors), measured(model, tensors)
    assert list(found.layers) == list(plain.layers)
    np.testing.assert_array_equal(found.cka, plain.cka)
    ratios = [skip_ratio.measure(one, tensors).ratio for one in (Net(), model)]
    np.testing.assert_array_equal(ratios[1], ratios[0])
    assert modes == [part.training for part in module.modules()]
    assert found.meta["models"][0]["weights_sha256"] == plain.meta["models"][0]["weights_sha256"]


def test_a_forward_of_ones_own_moves_and_copies_with_its_module():
    module = Net()
    own = wrap(module, forward=lambda m, x: m(x)).module
    own.double()
    assert module.patch.weight.dtype == torch.float64
    own.eval()
    assert not module.training and not module.blocks[0].training
    assert [name for name, _ in own.named_modules()] == [n for n, _ in module.named_modules()]
    assert own.state_dict().keys() == module.state_dict().keys()
    with pytest.raises(AttributeError):
        own.nothing_of_this_name  # noqa: B018


class OwnError(Exception):
    pass


def raising(error):
    def act(x):
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (raising(AttributeError("'NoneType' object has no attribute 'shape'")),
         "AttributeError: 'NoneType' object has no attribute 'shape'"),
        (raising(KeyError("pixel_values")), "KeyError: 'pixel_values'"),
        (raising(OwnError("of\nmine")), "OwnError: of mine"),
        (raising(AssertionError()), "AssertionError"),
        (lambda x: x.unflatten(-1, (5, 5)), "RuntimeError: "),
        (lambda x: next(v for v in [1 // 0]), "ZeroDivisionError: "),
    ],
)  # fmt: skip
def test_what_the_forward_raises_is_told_alike_by_every_measurement(act, words, tensors):
    net = Net(act)
    told = set()
    for one in (cka, attention_distance, attention_rollout, localization, receptive_field,
                skip_ratio):  # fmt: skip
        for _ in range(2):  # the very same exception, raised again, has a longer traceback
            with pytest.raises(VitprobeError) as caught:
                one.measure(net, tensors)
            told.add(str(caught.value))
    assert len(told) == 1
    line = told.pop()
    assert line.startswith(f"Net cannot run on images of (3, 32, 32): {words}")
    assert "(in blocks.0, Block)" in line


def test_an_error_of_a_later_batch_is_told_too(tensors):
    def late(x):
        if len(x) > 2:
            raise ValueError("two at most")
        return x.relu()

    with pytest.raises(VitprobeError, match=r"Net cannot run .*: ValueError: two at most"):
        cka.measure(Net(late), tensors)


def test_errors_of_ones_own_are_not_called_the_models():
    net, images = Net(), torch.randn(2, 3, 32, 32)

    def hook(module, args, output):
        raise ValueError("of the hook")

    net.blocks.register_forward_hook(hook)
    with pytest.raises(ValueError) as caught:
        net(images)
    # A hook of the user's is a part of the forward pass; one of vitprobe's is not.
    assert forward_failure(caught.value, [("Net", net)]) is not None
    assert forward_failure(caught.value, [("other", Net())]) is None
    assert forward_failure(ValueError("elsewhere"), [("Net", net)]) is None
    from vitprobe.tracing.capture import capture
    from vitprobe.tracing.layers import map_layers

    net = Net()
    layers = map_layers("Net", net, images).choose(["head"])
    with pytest.raises(ZeroDivisionError) as ours, capture(net, layers, lambda i, t: 1 // 0):
        net(images)
    assert forward_failure(ours.value, [("Net", net)]) is None


# Afterwards


class Caches(nn.Module):
    """Keeps its position codes, in one of the ways that people do."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.kept = way, {}
        self.patch, self.gain = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.ones(8))
        self.second = nn.Conv2d(8, 8, 1)

    def codes(self, n):
        if self.way == "buffer":
            if not hasattr(self, "codes_of_n"):
                self.register_buffer("codes_of_n", made(n), persistent=False)
            return self.codes_of_n
        if self.way == "lru_cache":
            return cached(n)
        return self.kept.setdefault(n, made(n))

    def forward(self, x):
        x = self.second(self.patch(x)).flatten(2).mT
        return x + self.gain * (x * self.codes(x.shape[1]))


def made(n):
    return (torch.arange(n)[:, None] * torch.linspace(0.1, 1, 8)).cos()


cached = functools.lru_cache(made)


@pytest.mark.parametrize("way", ["dict", "buffer", "lru_cache"])
def test_modules_that_keep_what_they_compute_can_train_afterwards(way, tensors):
    def gradient(module):
        module(tensors).square().sum().backward()
        return module.gain.grad

    cached.cache_clear()
    wanted = gradient(Caches(way))
    for one in (cka, localization, receptive_field):
        cached.cache_clear()
        module = Caches(way)
        one.measure(module, tensors, **({"layers": "second"} if one is localization else {}))
        torch.testing.assert_close(gradient(module), wanted)


class Silent(Net):
    """train() and to() give nothing back."""

    def train(self, mode=True):
        super().train(mode)
        self.head.eval()

    def eval(self):
        super().eval()

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)


def test_modules_whose_train_and_to_return_nothing(tensors):
    module = Silent()
    module.train()
    modes = [part.training for part in module.modules()]
    state = copy.deepcopy(module.state_dict())
    found = measured(module, tensors)
    np.testing.assert_array_equal(found.cka, measured(Net(), tensors).cka)
    receptive_field.measure(module, tensors[:2])
    assert modes == [part.training for part in module.modules()]
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])


class Remembers(Net):
    """Keeps more than tensors in its state dict."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def test_state_dicts_with_entries_that_are_no_tensors(tensors):
    one, other = wrap(Remembers()), wrap(Net())
    assert one.weights_sha256() == wrap(Remembers()).weights_sha256() != other.weights_sha256()
    assert np.isfinite(measured(one, tensors).cka).all()


@pytest.mark.parametrize(
    ("pool", "alike"),
    [
        (nn.LPPool2d(2, 2), nn.AvgPool2d(2)),
        (nn.LPPool2d(1, 3, stride=1), nn.AvgPool2d(3, stride=1)),
        (nn.AdaptiveMaxPool2d(8), nn.AdaptiveAvgPool2d(8)),
    ],
)
def test_less_common_pools_have_the_places_and_fields_of_the_common_ones(pool, alike, tensors):
    fields = []
    for one in (pool, alike):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), one, nn.Conv2d(4, 4, 3, padding=1))
        result = receptive_field.measure(wrap(net, "net"), tensors[:4], layers=["0", "1", "2"])
        assert list(result.layers) == ["0", "1", "2"]
        fields.append(result.box)
    np.testing.assert_array_equal(*fields)
