"""Places, tables and filters in networks of other libraries, where these are installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from vitprobe import attention_rollout, localization, patch_embedding, position_embedding
from vitprobe.models.loading import wrap
from vitprobe.position_embedding import similarity
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.places import Places, find_places

TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "patch_size": 8,
}  # fmt: skip


class Of(nn.Module):
    """A model of a library, called with the image alone, without extra arguments."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model.eval(), options

    def forward(self, x):
        return self.model(x, **self.options)


def grids(module, size, names, channels=3):
    """(rows, columns), tokens without a place and class token of layers."""
    x = torch.randn(2, channels, *size)
    layers = map_layers("net", module, x).choose(names)
    found = []
    for places in find_places(module, layers, x):
        assert isinstance(places, Places), places
        bare = tuple(sorted(places.without_place))
        found.append(((places.rows, places.columns), bare, places.class_token))
    return found


def relative(tables):
    """(heads, offsets, offsets) of Swin tables, which count from key to query."""
    side = round(len(tables) ** 0.5)
    return tables.detach().T.reshape(-1, side, side).flip(1, 2)


def test_transformers_vits_have_their_class_token_grid_and_table():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=(32, 48), **TINY)
    module = transformers.ViTForImageClassification(config).eval()
    nn.init.normal_(module.vit.embeddings.position_embeddings)
    assert grids(module, (32, 48), "*layer*.1") == [((4, 6), (0,), 0)]
    result = position_embedding.measure(wrap(module, "vit"))
    assert result.meta["tables"][0]["grid"] == [4, 6]
    table = module.vit.embeddings.position_embeddings[0, 1:].unflatten(0, (4, 6))
    np.testing.assert_allclose(result.of(0), similarity(table), atol=1e-6)
    found = localization.measure(wrap(module, "vit"), torch.randn(8, 3, 32, 48), quiet=True)
    assert found.grids.tolist() == [[4, 6]]


def test_transformers_dinov2_with_registers_shows_its_class_token():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    config = transformers.Dinov2WithRegistersConfig(
        image_size=48, num_register_tokens=4, attn_implementation="sdpa", **options
    )
    module = transformers.Dinov2WithRegistersForImageClassification(config).eval()
    found = grids(module, (48, 48), "*layer.1")
    assert found == [((6, 6), (0, 1, 2, 3, 4), 0)]
    result = position_embedding.measure(wrap(module, "dino"))
    assert result.meta["tables"][0]["grid"] == [6, 6]
    rollout = attention_rollout.measure(wrap(module, "dino"), torch.rand(1, 3, 48, 48), quiet=True)
    assert rollout.meta["maps"][0]["class_token"] == 0


def test_transformers_biases_of_swin_and_beit_are_their_tables():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    module = transformers.SwinModel(config).eval()
    tables = [p for n, p in module.named_parameters() if n.endswith("bias_table")]
    for table in tables:
        nn.init.normal_(table)
    result = position_embedding.measure(wrap(module, "swin"))
    assert len(result.layers) == len(tables) == 4
    for found, table in zip(result.bias, tables):
        np.testing.assert_allclose(found, relative(table), atol=1e-6)
    config = transformers.BeitConfig(
        image_size=32,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        **TINY,
    )  # fmt: skip
    module = transformers.BeitModel(config).eval()
    tables = [p for n, p in module.named_parameters() if n.endswith("bias_table")]
    for table in tables:
        nn.init.normal_(table)
    nn.init.normal_(module.embeddings.position_embeddings)
    result = position_embedding.measure(wrap(module, "beit"))
    assert result.meta["tables"][0]["grid"] == [4, 4]
    assert len(result.layers) == len(tables) == 2
    for found, table in zip(result.bias, tables):
        # The last three are of the class token.
        np.testing.assert_allclose(found, relative(table[:-3]), atol=1e-6)


def test_transformers_clip_shows_the_table_of_its_image_tower():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {"image_size": 32, "projection_dim": 8, **TINY}
    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 16, "projection_dim": 8}
    text.pop("patch_size")
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = transformers.CLIPModel(config)

        def forward(self, x):
            return self.clip.visual_projection(self.clip.vision_model(x).pooler_output)

    module = Images().eval()
    result = position_embedding.measure(wrap(module, "clip", input_size=(3, 32, 32)))
    assert [table["grid"] for table in result.meta["tables"]] == [[4, 4]]
    assert result.meta["tables"][0]["name"].startswith("clip.vision_model.embeddings")
    assert grids(module, (32, 32), "*vision_model.encoder.layers.1") == [((4, 4), (0,), 0)]


def test_open_clip_shows_the_table_of_its_image_tower_and_its_filters():
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    assert open_clip is not None

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = CLIP(32, vision, text)

        def forward(self, x):
            return self.clip.encode_image(x)

    module = Images().eval()
    result = position_embedding.measure(wrap(module, "clip", input_size=(3, 32, 32)))
    assert [table["name"] for table in result.meta["tables"]] == [
        "clip.visual.positional_embedding"
    ]
    table = module.clip.visual.positional_embedding[1:].unflatten(0, (4, 4))
    np.testing.assert_allclose(result.of(0), similarity(table), atol=1e-6)
    filters = patch_embedding.measure(wrap(module, "clip", input_size=(3, 32, 32)))
    assert filters.meta["stems"][0]["layer"] == "clip.visual.conv1"
    assert grids(module, (32, 32), "*resblocks.1")[0] == ((4, 4), (0,), 0)


def test_vit_pytorch_s_linear_stem_has_the_filters_of_its_pixels():
    pytest.importorskip("vit_pytorch")
    from vit_pytorch import ViT

    torch.manual_seed(0)
    module = ViT(
        image_size=(32, 48), patch_size=(8, 8), num_classes=5, dim=40, depth=2, heads=2, mlp_dim=32,
        channels=4,
    ).eval()  # fmt: skip
    assert grids(module, (32, 48), "transformer*", channels=4)[-1] == ((4, 6), (0,), 0)
    result = position_embedding.measure(wrap(module, "vit", input_size=(4, 32, 48)))
    assert result.meta["tables"][0]["grid"] == [4, 6]
    filters = patch_embedding.measure(wrap(module, "vit", input_size=(4, 32, 48)))
    # vit-pytorch norms the pixels of a patch, in the order of rows, columns, channels.
    linear = module.to_patch_embedding[2]
    weight = linear.weight.detach().numpy()
    expected, _ = patch_embedding.principal_components(weight, 28)
    np.testing.assert_allclose(filters.of(0).reshape(28, -1), expected, atol=1e-5)


def test_torchvision_s_biases_and_tables():
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4]).eval()
    tables = [p for n, p in swin.named_parameters() if n.endswith("bias_table")]
    result = position_embedding.measure(wrap(swin, "swin", input_size=(3, 64, 64)))
    assert len(result.layers) == len(tables) == 4
    for found, table in zip(result.bias, tables):
        np.testing.assert_allclose(found, relative(table), atol=1e-6)
    second = torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [4, 4],
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    ).eval()  # fmt: skip
    result = position_embedding.measure(wrap(second, "v2", input_size=(3, 64, 64)))
    attention = second.features[1][1].attn
    bias = attention.get_relative_position_bias().detach()[0]
    expected = position_embedding_by_offset(bias, 4)
    assert len(result.layers) == 4
    np.testing.assert_allclose(result.bias[1], expected, atol=1e-5)
    maxvit = torchvision.models.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 8, 0.0).eval()
    result = position_embedding.measure(wrap(maxvit, "maxvit"))
    assert len(result.layers) == 4
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32).eval()
    assert grids(vit, (32, 32), "encoder.layers.encoder_layer_1") == [((4, 4), (0,), 0)]
    assert position_embedding.measure(wrap(vit, "vit")).meta["tables"][0]["grid"] == [4, 4]


def position_embedding_by_offset(bias, side):
    """(heads, offsets, offsets) by a loop over pairs."""
    found = np.full((len(bias), 2 * side - 1, 2 * side - 1), np.nan)
    for q in range(side**2):
        for k in range(side**2):
            down, along = k // side - q // side, k % side - q % side
            found[:, down + side - 1, along + side - 1] = bias[:, q, k]
    return found
