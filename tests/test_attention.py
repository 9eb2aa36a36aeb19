"""The observer of attention: what it recognises, where tokens stand, and that it is honest."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models import nest
from torch import nn
from torch.nn import functional as F

from vitprobe.errors import VitprobeError
from vitprobe.tracing import attention as observer
from vitprobe.tracing.attention import map_attention, observe


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def create(name, **options):
    return timm.create_model(name, **options).eval()


def mapped(module, height=64, width=None, name="model"):
    return map_attention(name, module, torch.randn(2, 3, height, width or height))


def collected(module, found, images):
    """Every layer's probabilities in one piece: (images, groups, heads, queries, keys)."""
    whole = {}

    def reduce(i, block, which, queries):
        layer = found.layers[i]
        shape = (len(images), *layer.rows.shape, layer.queries.shape[1], layer.keys.shape[1])
        whole.setdefault(i, torch.full(shape, torch.nan))[which, :, :, queries] = block

    with torch.inference_mode(), observe(module, found, reduce):
        module(images)
    return [whole[i] for i in range(len(found.layers))]


def grid(rows, columns, stride, start):
    """(rows · columns, 2) middles of a grid's patches, row by row."""
    y, x = np.mgrid[:rows, :columns] * stride + start
    return np.stack([x.ravel(), y.ravel()], -1)


class Attending(nn.Module):
    """Patches of 4 px attend by ``how(q, k, v)``; heads in front of tokens."""

    def __init__(self, how, heads=2):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 24)
        self.how, self.heads = how, heads

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.how(q, k, v)


def softmaxed(q, k):
    return (q @ k.transpose(-2, -1)).softmax(-1)


WAYS = {
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    "inline": lambda q, k, v: softmaxed(q, k) @ v,
    "dropout": lambda q, k, v: F.dropout(softmaxed(q, k), 0.5, False) @ v,
    "values first": lambda q, k, v: (
        v.transpose(-2, -1) @ softmaxed(q, k).transpose(-2, -1)
    ).transpose(-2, -1),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", softmaxed(q, k), v),
    "einsum, scores too": lambda q, k, v: torch.einsum(
        "zhqk,zhkc->zhqc", torch.einsum("zhqc,zhkc->zhqk", q, k).softmax(-1), v
    ),
    "einsum, values first": lambda q, k, v: torch.einsum("bhjd,bhij->bhid", v, softmaxed(q, k)),
    "einsum, ellipsis": lambda q, k, v: torch.einsum("...ij,...jd->...id", softmaxed(q, k), v),
    "einsum, heads behind": lambda q, k, v: torch.einsum(
        "bhij,bjhd->bihd", softmaxed(q, k), v.transpose(1, 2)
    ).transpose(1, 2),
    "a softmax module": lambda q, k, v: nn.Softmax(-1)(q @ k.mT) @ v,
    "heads in the batch": lambda q, k, v: torch.bmm(softmaxed(q, k).flatten(0, 1), v.flatten(0, 1)),
}


class TestProbabilities:
    @pytest.mark.parametrize("way", WAYS)
    def test_every_way_of_writing_attention_gives_the_same_map(self, way):
        module = Attending(WAYS[way]).eval()
        found = mapped(module, 8, 12)
        images = torch.randn(3, 3, 8, 12)
        (block,) = collected(module, found, images)
        with torch.no_grad():
            x = module.patch(images).flatten(2).mT
            q, k, _ = module.qkv(x).reshape(3, 6, 3, 2, -1).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(block[:, 0], softmaxed(q, k), atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(found.layers[0].queries[0], grid(2, 3, 4, 2))

    @pytest.mark.parametrize("kind", ["bool", "float", "causal"])
    def test_masks(self, kind):
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        options = {
            "bool": {"attn_mask": mask},
            "float": {"attn_mask": torch.zeros(6, 6).masked_fill(~mask, -torch.inf)},
            "causal": {"is_causal": True},
        }[kind]
        module = Attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
        (block,) = collected(module, mapped(module, 8, 12), torch.randn(2, 3, 8, 12))
        assert (block[..., ~mask] == 0).all()
        torch.testing.assert_close(block.sum(-1), torch.ones(block.shape[:-1]))

    def test_grouped_queries_share_their_keys(self):
        module = Attending(
            lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
            heads=4,
        )
        found = mapped(module, 8, 12)
        assert found.layers[0].heads == 4
        (block,) = collected(module, found, torch.randn(2, 3, 8, 12))
        torch.testing.assert_close(block.sum(-1), torch.ones(block.shape[:-1]))

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
    def test_fused_and_inline_give_the_same_digits(self, name):
        images = torch.randn(2, 3, 64, 64)
        maps = []
        for fused in (1, 0):
            set_fused_attn(bool(fused))
            try:
                torch.manual_seed(0)
                module = create(name, img_size=64, depth=2)
            finally:
                set_fused_attn(True)
            found = mapped(module, 64)
            maps.append(collected(module, found, images))
        for fused, inline in zip(*maps):
            torch.testing.assert_close(fused, inline, atol=1e-6, rtol=1e-4)

    def test_pytorchs_own_attention(self, monkeypatch):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.patch = nn.Conv2d(3, 8, 4, 4)
                self.own = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                x = self.patch(x).flatten(2).mT
                return self.own(x, x, x, need_weights=False)[0]

        module = Own().eval()
        found = mapped(module, 8, 12)
        images = torch.randn(3, 3, 8, 12)
        (block,) = collected(module, found, images)
        with torch.no_grad():
            x = module.patch(images).flatten(2).mT
            expected = module.own(x, x, x, average_attn_weights=False)[1]
        torch.testing.assert_close(block[:, 0], expected)
        np.testing.assert_allclose(found.layers[0].keys[0], grid(2, 3, 4, 2))
        # What it puts out beside its weights is held against what it put out.
        again = observer.same_twice
        monkeypatch.setattr(observer, "same_twice", lambda out, *rest: again(out + 1e-4, *rest))
        with pytest.raises(VitprobeError, match="does not give what the layer put out"):
            collected(module, found, images)

    def test_blocks_of_few_queries_make_up_the_whole(self, monkeypatch):
        module = create("test_vit", img_size=64)
        found, images = mapped(module, 64), torch.randn(3, 3, 64, 64)
        whole = collected(module, found, images)
        monkeypatch.setattr(observer, "_CPU_BLOCK", 2 * 17 * 5)
        sizes = []
        with torch.inference_mode(), observe(module, found, lambda i, b, *_: sizes.append(b.shape)):
            module(images)
        assert {size[0] for size in sizes} == {1}
        assert max(size[-2] for size in sizes) == 5
        for one, other in zip(whole, collected(module, found, images)):
            torch.testing.assert_close(one, other)

    def test_bfloat16_and_float64(self):
        module = create("test_vit", img_size=64)
        found, images = mapped(module, 64), torch.randn(2, 3, 64, 64)
        exact = collected(module, found, images)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = collected(module, found, images)[0]
        torch.testing.assert_close(rough, exact, atol=1e-2, rtol=5e-2)
        wide = collected(module.double(), found, images.double())[0]
        torch.testing.assert_close(wide, exact, atol=1e-5, rtol=1e-4, check_dtype=False)

    def test_what_heads_put_out(self):
        module = Attending(WAYS["fused"])
        found, images, seen = mapped(module, 8, 12), torch.randn(3, 3, 8, 12), []
        with torch.inference_mode(), observe(module, found, outputs=lambda i, t: seen.append(t)):
            out = module(images)
        torch.testing.assert_close(seen[0][:, 0], out)


class TestHonesty:
    def test_output_that_the_probabilities_do_not_give_is_an_error(self, monkeypatch):
        module = Attending(WAYS["fused"])
        found = mapped(module, 8, 12)
        real = observer.joined
        monkeypatch.setattr(observer, "joined", lambda q, *rest: real(q * 1.01, *rest))
        with pytest.raises(VitprobeError, match="output of model does not give what the layer put"):
            collected(module, found, torch.randn(2, 3, 8, 12))

    def test_rows_that_are_no_probabilities_are_an_error(self):
        module = Attending(lambda q, k, v: (2 * softmaxed(q, k)) @ v)
        found = mapped(module, 8, 12)
        with pytest.raises(VitprobeError, match="changes its attention after the softmax"):
            collected(module, found, torch.randn(2, 3, 8, 12))

    def test_a_mix_of_two_maps_is_taken_as_it_meets_the_values(self):
        module = Attending(lambda q, k, v: (softmaxed(q, k) / 2 + softmaxed(k, q) / 2) @ v)
        (block,) = collected(module, mapped(module, 8, 12), torch.randn(2, 3, 8, 12))
        torch.testing.assert_close(block.sum(-1), torch.ones(block.shape[:-1]))

    def test_lost_places_name_model_layer_and_operation(self):
        module = Attending(lambda q, k, v: softmaxed(q, k.sort(-2).values) @ v.sort(-2).values)
        with pytest.raises(VitprobeError, match=r"tokens of odd .* cannot be told: sort .* output"):
            mapped(module, 8, name="odd")

    def test_a_pass_that_attends_otherwise_is_an_error(self):
        module = create("test_vit", img_size=64)
        found = mapped(module, 64)
        module.blocks = module.blocks[:-1]
        with pytest.raises(VitprobeError, match="attended 5 times in this pass, but 6 times"):
            collected(module, found, torch.randn(1, 3, 64, 64))

    def test_another_number_of_tokens_is_an_error(self):
        module = create("test_vit", img_size=64, dynamic_img_size=True)
        found = mapped(module, 64)
        with pytest.raises(VitprobeError, match=r"has 26 queries and 26 keys .* but 17 and 17"):
            collected(module, found, torch.randn(1, 3, 80, 80))

    def test_hooks_and_marks_are_gone_after_success_and_failure(self):
        module = create("test_vit", img_size=64)
        images = torch.randn(2, 3, 64, 64)
        found = map_attention("model", module, images)
        assert not vars(images)

        def fail(*_):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), observe(module, found, fail):
            module(images)
        for part in module.modules():
            assert not part._forward_hooks and not part._forward_pre_hooks

    def test_watching_changes_nothing(self):
        module = create("test_vit", img_size=64)
        found, images = mapped(module, 64), torch.randn(2, 3, 64, 64)
        with torch.inference_mode():
            expected = module(images)
            with observe(module, found, lambda *_: None):
                torch.testing.assert_close(module(images), expected, atol=0, rtol=0)


class TestLayout:
    @pytest.mark.parametrize(
        ("name", "prefix"),
        [
            ("vit_tiny_patch16_224", 1),
            ("deit_tiny_distilled_patch16_224", 2),
            ("vit_small_patch14_reg4_dinov2", 5),
            ("vit_base_patch16_siglip_224", 0),
            ("eva02_tiny_patch14_224", 1),
        ],
    )
    def test_prefix_tokens_stand_nowhere_and_patches_on_an_oblong_grid(self, name, prefix):
        patch = 14 if "14" in name else 16
        module = create(name, img_size=(3 * patch, 5 * patch), depth=2)
        found = mapped(module, 3 * patch, 5 * patch)
        assert len(found.layers) == 2
        for layer in found.layers:
            assert np.isnan(layer.queries[0, :prefix]).all()
            np.testing.assert_allclose(layer.queries[0, prefix:], grid(3, 5, patch, patch / 2))
            np.testing.assert_array_equal(layer.queries, layer.keys)

    @pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
    def test_shifted_windows_by_brute_force(self, name):
        window = 7 if "7" in name else 8
        side = 2 * window
        module = create(
            name, img_size=4 * side, depths=(2,), num_heads=(3,), embed_dim=12, window_size=window
        )
        found = mapped(module, 4 * side)
        for layer, shift in zip(found.layers, (0, window // 2)):
            places = set()
            for row in range(0, side, window):
                for column in range(0, side, window):
                    members = [
                        (
                            4 * ((column + j + shift) % side) + 2.0,
                            4 * ((row + i + shift) % side) + 2.0,
                        )
                        for i in range(window)
                        for j in range(window)
                    ]
                    places.add(tuple(members))
            assert layer.rows.shape == (4, 3)
            assert {tuple(map(tuple, group)) for group in layer.queries} == places
            np.testing.assert_array_equal(layer.queries, layer.keys)

    def test_maxvit_blocks_and_grids_by_brute_force(self):
        module = create("test_maxvit", img_size=128)
        near, far = mapped(module, 128).layers[:2]
        window, side, stride = 4, 32, 4  # timm: a window for every 32 px, the map of stage 0
        count = side // window
        first = near.queries.reshape(-1, 2).min(0)
        for layer, spread in ((near, False), (far, True)):
            expected = set()
            for row in range(count):
                for column in range(count):
                    # A block holds neighbours; a grid holds every count-th row and column.
                    members = [
                        (
                            (j * count + column if spread else column * window + j) * stride,
                            (i * count + row if spread else row * window + i) * stride,
                        )
                        for i in range(window)
                        for j in range(window)
                    ]
                    expected.add(tuple(members))
            steps = np.round(layer.queries - first, 3)
            assert layer.rows.shape == (count**2, 1)
            assert {tuple(map(tuple, group)) for group in steps} == expected
            np.testing.assert_array_equal(layer.queries, layer.keys)

    def test_strided_keys_stand_between_the_queries(self):
        module = create("pvt_v2_b0", depths=(1, 1, 1, 1))
        found = mapped(module, 128)
        # A stem of stride 4 and padding 3 is centred on pixel 4i; those after it have stride 2 and
        # padding 1. Keys are made of 8, 4, 2 and 1 queries a side.
        for layer, stride, together in zip(found.layers, (4, 8, 16, 32), (8, 4, 2, 1)):
            side = 128 // stride
            np.testing.assert_allclose(layer.queries[0], grid(side, side, stride, 0.5))
            middle = 0.5 + stride * (together - 1) / 2
            np.testing.assert_allclose(layer.keys[0], grid(4, 4, 32, middle))

    def test_unfolded_patches_by_brute_force(self):
        module = create("mobilevit_xxs")
        layer = mapped(module, 64).layers[0]
        # A map of 8 x 8 places in patches of 2 x 2: the same corner of all patches attends.
        first = layer.queries.reshape(-1, 2).min(0)
        expected = {
            tuple((8 * (2 * x + j), 8 * (2 * y + i)) for y in range(4) for x in range(4))
            for i in range(2)
            for j in range(2)
        }
        assert layer.rows.shape == (4, 4)
        found = np.round(layer.queries - first, 3)
        assert {tuple(map(tuple, group)) for group in found} == expected
        np.testing.assert_array_equal(layer.queries, layer.keys)

    @pytest.mark.parametrize("family", ["nest", "hiera"])
    def test_blocks_that_are_unrolled_by_brute_force(self, family):
        # Stage 0 attends in squares of 8 x 8 tokens; NesT then has 4 x 4 of them, Hiera any number.
        block, stride = 8, 4
        if family == "hiera":
            side, module = 64, create("hiera_tiny_224", img_size=64)
        else:
            side = 128
            module = nest.Nest(side, depths=(1, 1, 1), embed_dims=(8, 8, 8), num_heads=(1, 1, 1))
        layer = mapped(module.eval(), side).layers[0]
        count = side // stride // block
        expected = {
            frozenset(
                (stride * (column * block + j), stride * (row * block + i))
                for i in range(block)
                for j in range(block)
            )
            for row in range(count)
            for column in range(count)
        }
        found = np.round(layer.queries - layer.queries.reshape(-1, 2).min(0), 3)
        assert {frozenset(map(tuple, group)) for group in found} == expected
        np.testing.assert_array_equal(layer.queries, layer.keys)

    def test_blocks_and_their_halo_by_brute_force(self):
        layer = mapped(create("halonet26t"), 256).layers[0]
        # The map is 16 x 16 at stride 16: blocks of 8 x 8, with 2 more around them as keys.
        assert layer.rows.shape == (4, 8)
        origin = layer.queries.reshape(-1, 2).min(0)
        for group, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            y, x = np.mgrid[:8, :8]
            at = np.stack([x.ravel() + 8 * column, y.ravel() + 8 * row], -1)
            np.testing.assert_allclose((layer.queries[group] - origin) / 16, at)
            y, x = np.mgrid[-2:10, -2:10]
            at = np.stack([x.ravel() + 8 * column, y.ravel() + 8 * row], -1).astype(float)
            at[((at < 0) | (at > 15)).any(1)] = np.nan
            np.testing.assert_allclose((layer.keys[group] - origin) / 16, at)

    def test_hybrid_stem_with_asymmetric_padding(self):
        vit = create("vit_base_r50_s16_224", img_size=64, depth=1, embed_dim=24, num_heads=2)
        layer = mapped(vit, 64).layers[0]
        steps = np.diff(layer.queries[0, 1:].reshape(4, 4, 2), axis=1)[..., 0]
        np.testing.assert_allclose(steps, 16)

    def test_images_within_or_across_rows(self):
        def windows_first(q, k, v):
            q, k, v = (
                t.unflatten(2, (2, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1) for t in (q, k, v)
            )
            return F.scaled_dot_product_attention(q, k, v)

        module = Attending(windows_first)
        found = mapped(module, 8, 12)
        layer = found.layers[0]
        assert not layer.images_first
        np.testing.assert_allclose(layer.queries.reshape(-1, 2), grid(2, 3, 4, 2))
        images = torch.randn(3, 3, 8, 12)
        (block,) = collected(module, found, images)
        (alone,) = collected(module, found, images[1:2])
        torch.testing.assert_close(block[1:2], alone)

    @pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "mobilevitv2_050"])
    def test_attention_over_something_else_is_left_out_with_a_reason(self, name):
        options = {"depth": 2} if name.startswith("xcit") else {}
        found = mapped(create(name, **options), 64, name=name)
        assert not found.layers and found.left_out
        with pytest.raises(VitprobeError, match=f"{name} has no attention between places"):
            found.require("distance")

    def test_attention_that_is_no_probability_is_not_called_none(self):
        found = mapped(create("cait_xxs24_224", img_size=64, depth=1), name="cait")
        assert not found.layers
        with pytest.raises(
            VitprobeError, match=r"cait attends with weights that are not prob.* mix"
        ):
            found.require("distance")

    def test_an_empty_container_leaves_the_pass_as_it_is(self):
        class Bypass(nn.Module):
            def __init__(self):
                super().__init__()
                self.attending = Attending(WAYS["fused"])
                self.shortcut = nn.Sequential()

            def forward(self, x):
                return self.attending(self.shortcut(x))

        assert len(mapped(Bypass(), 8, 12).layers) == 1

    def test_a_cnn_has_none(self):
        found = mapped(create("test_resnet"), name="test_resnet")
        with pytest.raises(VitprobeError, match=r"test_resnet has no attention .* no distance\.$"):
            found.require("distance")
