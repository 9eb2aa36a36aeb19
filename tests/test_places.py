"""Where the vectors of layers stand: grids of known networks, whatever their size and order."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import linear_probe, localization, skip_ratio
from vitprobe.errors import NotApplicable
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.places import Places, find_places


class Embed(nn.Module):
    """Patches of an image as tokens, with others before, amid or behind them."""

    def __init__(self, kernel, stride=None, before=0, amid=0, behind=0, tokens_last=False):
        super().__init__()
        self.project = nn.Conv2d(3, 8, kernel, stride or kernel)
        self.extra = nn.ParameterList(torch.randn(1, n, 8) for n in (before, amid, behind))
        self.tokens_last = tokens_last
        self.out = nn.Identity()
        self.reads = None  # which token the output is made of; all of them where None

    def forward(self, x):
        x = self.project(x).flatten(2).mT
        before, amid, behind = (one.expand(len(x), -1, -1) for one in self.extra)
        half = x.shape[1] // 2
        x = torch.cat([before, x[:, :half], amid, x[:, half:], behind], 1)
        x = self.out(x.mT if self.tokens_last else x)
        return x if self.reads is None else x[:, self.reads]


def places_of(module, size, layer="out", channels=3):
    example = torch.randn(2, channels, *size)
    module = module.eval()
    (found,) = map_layers("net", module, example).choose(layer)
    (places,) = find_places(module, [found], example)
    return places


def grid(places):
    assert isinstance(places, Places), places
    return places.rows, places.columns


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "expected"),
    [
        (16, None, (64, 128), (4, 8)),
        ((16, 8), None, (64, 64), (4, 8)),
        (14, None, (100, 60), (7, 4)),  # a border that patches do not reach
        (16, 10, (64, 64), (5, 5)),  # patches overlap
        (16, None, (16, 64), (1, 4)),
        (16, None, (16, 16), (1, 1)),
    ],
)
@pytest.mark.parametrize("extra", [(0, 0, 0), (1, 0, 0), (5, 0, 0), (0, 1, 0), (2, 3, 4)])
def test_patches_form_a_grid_wherever_other_tokens_stand(kernel, stride, size, expected, extra):
    module = Embed(kernel, stride, *extra)
    places = places_of(module, size)
    assert grid(places) == expected
    assert len(places.without_place) == sum(extra)
    x = torch.randn(2, 3, *size)
    taken = places.spatial(module(x))
    torch.testing.assert_close(taken, module.project(x).flatten(2).mT)
    torch.testing.assert_close(
        places.at(module(x), *[side // 2 for side in expected]),
        taken[:, expected[0] // 2 * expected[1] + expected[1] // 2],
    )


def test_tokens_that_come_last_are_tokens_all_the_same():
    module = Embed(8, before=1, behind=2, tokens_last=True)
    places = places_of(module, (32, 48))
    assert grid(places) == (4, 6)
    assert (places.axes, places.features) == ((2,), 8)
    assert sorted(places.without_place) == [0, 25, 26]
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(places.spatial(module(x)), module.project(x).flatten(2).mT)
    torch.testing.assert_close(
        places.rest(module(x))[:, 1:], torch.cat([*module.extra[2:]], 1).expand(2, -1, -1)
    )


@pytest.mark.parametrize("reads", [0, 1, 9, 13])
def test_the_class_token_is_the_one_that_the_output_reads(reads):
    module = Embed(8, before=2, amid=1, behind=3)  # tokens 0, 1, 10 and 19 to 21
    module.reads = reads + (1 if reads == 9 else 6 if reads == 13 else 0)
    places = places_of(module, (32, 32))
    assert places.class_token == module.reads
    assert set(places.without_place) == {0, 1, 10, 19, 20, 21}


def test_without_a_token_that_is_read_by_itself_there_is_no_class_token():
    several = Embed(8, before=3)
    assert places_of(several, (32, 32)).class_token is None
    # Of a single one that is handed on nothing else could be meant.
    assert places_of(Embed(8, behind=1), (32, 32)).class_token == 16
    averaged = nn.Sequential(Embed(8, before=1), nn.Flatten(2))
    averaged.append(nn.AdaptiveAvgPool1d(8))
    averaged[0].reads = slice(1, None)
    assert places_of(averaged, (32, 32), "0.out").class_token is None
    one_of_patches = Embed(8, before=1)
    one_of_patches.reads = 4
    assert places_of(one_of_patches, (32, 32)).class_token is None


@pytest.mark.parametrize(
    ("name", "size", "prefix", "class_token"),
    [
        ("test_vit", 64, 1, 0),
        ("test_vit2", 64, 1, None),  # a register, and the mean of patches
        ("test_vit3", 64, 1, None),  # attention pooling
        ("vit_base_patch16_siglip_224", 32, 0, None),
        ("deit_tiny_distilled_patch16_224", 32, 2, 0),
    ],
)
def test_timm_s_vits_have_the_prefix_that_they_say(name, size, prefix, class_token):
    torch.manual_seed(0)
    module = timm.create_model(name, img_size=size, depth=2).eval()
    example = torch.randn(2, 3, size, size)
    layers = map_layers(name, module, example).choose("blocks.?")
    assert module.num_prefix_tokens == prefix
    for places in find_places(module, layers, example):
        assert grid(places) == (size // 16, size // 16)
        assert places.without_place == tuple(range(prefix))
        assert places.class_token == class_token


class Deep(nn.Module):
    """Prompts of its own in every block, as many as the patches or more; a block by itself."""

    def __init__(self, prompts):
        super().__init__()
        self.project = nn.Conv2d(3, 8, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.prompts = nn.Parameter(torch.randn(2, prompts, 8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = self.project(x).flatten(2).mT
        head = self.cls.expand(len(x), -1, -1)
        for prompts, block in zip(self.prompts, self.blocks):
            together = block(torch.cat([head, prompts.expand(len(x), -1, -1), x], 1))
            head, x = together[:, :1], together[:, 1 + len(prompts) :]
        return head[:, 0]


@pytest.mark.parametrize("prompts", [5, 8, 100])
def test_prompts_are_no_patches_however_many(prompts):
    example = torch.randn(2, 3, 32, 32)
    module = Deep(prompts)
    layers = map_layers("net", module, example).choose("blocks.*")
    for places in find_places(module, layers, example):
        assert grid(places) == (4, 4)
        assert len(places.without_place) == 1 + prompts
        assert places.class_token == 0


class Windows(nn.Module):
    """Windows of 4 x 4 pixels, shifted, folded into the batch; the two axes of it as told."""

    def __init__(self):
        super().__init__()
        self.out, self.maps, self.turned = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        x = torch.roll(x, (-2, -2), (2, 3))
        x = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 3, 5, 1)
        x = self.out(x.flatten(3, 4).flatten(0, 2))  # (windows, 16, channels)
        return self.turned(self.maps(x * 1).mT)


@pytest.mark.parametrize("layer", ["out", "maps", "turned"])
def test_windows_keep_the_places_of_their_tokens(layer):
    module, size = Windows(), (8, 12)
    places = places_of(module, size, layer)
    assert grid(places) == size
    x = torch.randn(2, 3, *size)
    tensor = _output(module, layer, x).unflatten(0, (2, -1))
    torch.testing.assert_close(places.spatial(tensor), x.flatten(2).mT)


def _output(module, layer, x):
    kept = []
    handle = module.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o))
    module(x)
    handle.remove()
    return kept[0]


def test_maps_enlarged_turned_over_or_square_in_all_axes_are_maps():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.over, self.last = (
                nn.Upsample(scale_factor=2),
                nn.Identity(),
                nn.Identity(),
            )

        def forward(self, x):
            large = self.large(x)
            return large, self.over(x.flip(3)), self.last(x.permute(0, 2, 3, 1) * 1)

    module, size = Maps(), (6, 6)
    x = torch.randn(2, 6, *size)
    for name, rows in (("large", 12), ("over", 6), ("last", 6)):
        places = places_of(module, size, name, channels=6)
        assert grid(places) == (rows, rows)
    assert places.axes == (1, 2)
    over = places_of(module, size, "over", channels=6)
    torch.testing.assert_close(over.spatial(x.flip(3)), x.flatten(2).mT)


class Lost(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Conv2d(3, 8, 8, 8), nn.Identity()

    def forward(self, x):
        return self.out(self.project(x).flatten(2).mT.sort(1).values)


class Kept(nn.Module):
    """Keeps the brightest patches of each image, or moves the brightest to the front."""

    def __init__(self, moves=False):
        super().__init__()
        self.project, self.out, self.moves = nn.Conv2d(3, 8, 8, 8), nn.Identity(), moves

    def forward(self, x):
        x = self.project(x).flatten(2).mT
        if self.moves:
            return self.out(torch.stack([one.roll(-int(one[:, 0].argmax()), 0) for one in x]))
        index = x.detach()[..., 0].argsort(1)[:, :8, None].expand(-1, -1, 8)
        return self.out(x.gather(1, index))


def test_a_line_says_why_there_is_no_grid():
    torch.manual_seed(0)
    assert "sort in or before it loses where its parts stand" in places_of(Lost(), (32, 32))
    assert "argsort in or before it loses where its parts" in places_of(Kept(), (32, 32))
    assert "differs from image to image" in places_of(Kept(moves=True), (32, 32))
    mixer = timm.create_model("mixer_s32_224", img_size=64)
    assert "part of it is 512 × 256" in places_of(mixer, (64, 64), "blocks.0.mlp_tokens.fc1")
    assert grid(places_of(mixer, (64, 64), "blocks.0")) == (2, 2)
    with pytest.raises(NotApplicable, match="out of net has no grid of places: sort in or before"):
        localization.measure(wrap(Lost(), "net"), torch.randn(8, 3, 32, 32), layers="out")


class Prunes(nn.Module):
    """Two blocks, the latter of half of the tokens, chosen by what is in them."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.ModuleList([Adds(), Adds()])

    def forward(self, x):
        x = self.blocks[0](self.project(x).flatten(2).mT)
        index = x[..., 0].argsort(1)[:, :8, None].expand(-1, -1, 8)
        return self.blocks[1](x.gather(1, index))


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.turn(x).relu()


def test_a_block_that_loses_its_places_is_told_and_never_replaced_by_an_earlier_one(capsys):
    images = torch.randn(8, 3, 32, 32)
    with pytest.raises(NotApplicable, match=r"blocks.1 of net, its last block, .* argsort"):
        localization.measure(wrap(Prunes(), "net"), images)
    result = localization.measure(wrap(Prunes(), "net"), images, layers="blocks")
    assert result.layers.tolist() == ["blocks.0"]
    assert "net: the layer blocks.1 left out: argsort in or before it" in capsys.readouterr().err


class Summed(nn.Module):
    """A class token and registers behind the patches; branches of known size."""

    def __init__(self):
        super().__init__()
        self.embed = Embed(8, amid=1, behind=2)
        self.embed.extra[1].data *= 3
        self.block = Scaled()

    def forward(self, x):
        return self.block(self.embed(x))[:, 8]


class Scaled(nn.Module):
    """Adds to each token what is as long as it, to the class token a tenth of it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(19, 1))
        self.scale.data[8] = 0.1
        self.scale.data[17:] = 100.0
        self.turn = nn.Linear(8, 8, bias=False)
        nn.init.orthogonal_(self.turn.weight)

    def forward(self, x):
        return x + self.turn(x) * self.scale


def test_skip_ratios_of_patches_leave_out_what_stands_amid_and_behind_them():
    result = skip_ratio.measure(Summed(), torch.randn(4, 3, 32, 32))
    layout = result.meta["layouts"][0]
    assert (layout["class_token"], layout["without_place"]) == (8, [8, 17, 18])
    assert result.spatial[0] == pytest.approx(1, rel=1e-5)
    assert result.ratio[0, 8] == pytest.approx(10, rel=1e-5)
    result.plot()


def test_probes_of_a_class_token_amid_the_patches_read_it():
    class Told(nn.Module):
        """The class token holds the image's mean; patches and the register behind hold noise."""

        def __init__(self):
            super().__init__()
            self.project, self.out = nn.Conv2d(3, 3, 4, 4), nn.Identity()

        def forward(self, x):
            mean, noise = x.mean((2, 3))[:, None], self.project(x - x.mean((2, 3), keepdim=True))
            noise = noise.flatten(2).mT
            x = self.out(torch.cat([noise[:, :2], mean, noise[:, 2:], 0 * mean], 1))
            return x[:, 2]

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    pixels = (
        torch.randn(120, 3, 8, 8, generator=generator) + 3 * torch.eye(3)[labels][..., None, None]
    )
    images = replace(open_images(pixels), labels=labels.numpy(), classes=("a", "b", "c"))
    result = linear_probe.measure(Told(), images, layers="out", shots=8, draws=2)
    readouts = result.readouts.tolist()
    assert result.accuracy[0, readouts.index("CLS")] == 1
    assert result.accuracy[0, readouts.index("tokens")] < 0.6


@pytest.mark.parametrize("turned", [False, True])
def test_sums_written_as_einsum_keep_their_rows(turned):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3 * 8 * 8, 6))
            self.out, self.mixed = nn.Identity(), nn.Identity()

        def forward(self, x):
            x = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
            x = torch.einsum("nchpwq->nhwpqc", x).flatten(3).flatten(1, 2)
            q = k = torch.einsum("b i d, d e -> b i e", x, self.weight)
            # The keys' factor comes first where it is turned: rows stand at queries all the same.
            scores = (
                torch.einsum("bjd,bid->bij", k, q) if turned else torch.einsum("bid,bjd->bij", q, k)
            )
            mixed = torch.einsum("bij,bid->bdj", scores * 0 + 1, x)
            return self.out(torch.einsum("bij,bjd->bid", scores.softmax(-1), x)), self.mixed(mixed)

    places = places_of(Net(), (32, 48))
    assert grid(places) == (4, 6)
    assert np.array_equal(places.order, np.arange(24).reshape(4, 6))
    assert not isinstance(places_of(Net(), (32, 48), "mixed"), Places)
