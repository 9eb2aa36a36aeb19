"""Position embeddings: known tables, biases by brute force, and models that have neither."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import nest
from torch import nn

from vitprobe import position_embedding
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.position_embedding import axis_gain, decay, measure, similarity
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.tracing.positions import by_offset, find_table, resample


def with_table(table, prefix=1):
    """A ViT that holds a table (rows, columns, features)."""
    rows, columns, features = table.shape
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=(16 * rows, 16 * columns), embed_dim=features, num_heads=1,
        depth=1, num_classes=0, reg_tokens=prefix - 1,
    )  # fmt: skip
    with torch.no_grad():
        flat = table.flatten(0, 1)
        module.pos_embed[0, -len(flat) :] = flat
    return wrap(module, "made")


@pytest.mark.parametrize("prefix", [1, 5])
def test_similarity_of_a_known_table(prefix):
    table = torch.eye(6).reshape(2, 3, 6)
    table[1, 2] = -table[0, 0]
    result = measure(with_table(table, prefix))
    assert result.similarity.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(result.similarity[0, 0], [[1, 0, 0], [0, 0, -1]], atol=1e-7)


def test_similarity_knows_no_scale_and_an_empty_embedding_has_none():
    table = torch.randn(3, 4, 8)
    np.testing.assert_allclose(similarity(table), similarity(8 * table))
    table[0, 0] = 0
    assert np.isnan(similarity(table)[0, 0]).all()


def test_sine_and_cosine_tables_are_the_more_alike_the_nearer():
    table = build_sincos2d_pos_embed([8, 8], dim=64).reshape(8, 8, 64)
    result = measure(with_table(table))
    assert decay(result.similarity) < -0.8
    assert result.findings()[0].verdict == HOLDS


def test_rows_and_columns_stand_out_where_the_table_is_a_sum_of_theirs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 1, 256, generator=generator)
    columns = torch.randn(1, 6, 256, generator=generator)
    assert axis_gain(similarity(rows + columns)) == pytest.approx(0.5, abs=0.1)
    noise = torch.randn(6, 6, 256, generator=generator)
    assert axis_gain(similarity(noise)) == pytest.approx(0, abs=0.05)


def test_resampling_to_the_same_grid_changes_nothing_and_keeps_constants():
    table = torch.randn(4, 6, 8)
    torch.testing.assert_close(resample(table, 4, 6), table)
    flat = torch.ones(4, 6, 8)
    torch.testing.assert_close(resample(flat, 7, 3), torch.ones(7, 3, 8))


def test_another_resolution_is_a_second_table():
    result = measure(with_table(torch.randn(4, 6, 8)), grid=(3, 5))
    assert [table["grid"] for table in result.meta["tables"]] == [[4, 6], [3, 5]]
    assert result.of(1).shape == (3, 5, 3, 5)
    assert np.isfinite(result.of(0)).all() and np.isfinite(result.of(1)).all()


def test_bias_by_offset_by_brute_force():
    rows, columns, table = 3, 4, torch.randn(2, 5, 7)
    bias = torch.empty(2, 12, 12)
    for q in range(12):
        for k in range(12):
            dy, dx = k // columns - q // columns, k % columns - q % columns
            bias[:, q, k] = table[:, dy + rows - 1, dx + columns - 1]
    np.testing.assert_allclose(by_offset(bias, rows, columns), table.numpy())


def test_swin_table_comes_back():
    module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(1, 2), embed_dim=12
    )
    result = measure(wrap(module, "swin"))
    assert result.bias.shape == (2, 2, 13, 13) and not len(result.similarity)
    table = module.layers[0].blocks[0].attn.relative_position_bias_table.detach()
    # Swin counts offsets from key to query.
    expected = table[:, 0].reshape(13, 13).flip(0, 1)
    np.testing.assert_allclose(result.bias[0, 0], expected, atol=1e-7)
    assert np.isnan(result.bias[0, 1]).all()


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("beit_base_patch16_224", 1),
        ("swinv2_tiny_window8_256", 1),
        ("swinv2_cr_tiny_224", 2),
        ("test_coatnet", 3),
    ],
)
def test_families_with_a_bias(name, layers):
    options = {
        "beit_base_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 64},
        "swinv2_tiny_window8_256": {"depths": (1,), "num_heads": (1,), "embed_dim": 12},
        "swinv2_cr_tiny_224": {
            "depths": (1, 1),
            "num_heads": (1, 1),
            "embed_dim": 12,
            "img_size": 64,
        },
    }.get(name, {"img_size": 64})
    result = measure(wrap(timm.create_model(name, **options), name))
    assert len(result.layers) == layers
    assert result.plot() is not None


def test_neither_table_nor_bias_gets_its_line():
    for name in ("test_resnet", "mobilevit_xxs"):
        with pytest.raises(VitprobeError, match="has no position embedding"):
            measure(wrap(timm.create_model(name), name))


def test_a_table_of_maps_and_of_another_library():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Module()
            self.encoder.pos_embedding = nn.Parameter(torch.randn(1, 26, 8))

    assert measure(wrap(Other(), "other")).similarity.shape == (5, 5, 5, 5)
    pit = timm.create_model("pit_ti_224", img_size=64)
    rows, columns = pit.pos_embed.shape[-2:]
    assert measure(wrap(pit, "pit")).similarity.shape[:2] == (rows, columns)


@pytest.mark.parametrize("name", ["pos_embed_0", "patch_pos", "pos_embed1", "position_embeddings"])
def test_names_of_tables(name):
    module = nn.Module()
    setattr(module, name, nn.Parameter(torch.randn(1, 26, 8)))
    assert measure(wrap(module, "named")).similarity.shape == (5, 5, 5, 5)


def test_a_table_larger_than_the_models_own_grid():
    module = nn.Module()
    module.patch_embed = nn.Module()
    module.patch_embed.grid_size = (4, 4)
    module.pos_embed = nn.Parameter(torch.randn(1, 36, 8))
    assert measure(wrap(module, "larger")).similarity.shape == (6, 6, 6, 6)


def test_a_table_that_is_one_block_after_another():
    module = nest.Nest(img_size=64, embed_dims=(8, 8, 8), num_heads=(1, 1, 1), depths=(1, 1, 1))
    table = module.levels[0].pos_embed.detach()  # (1, 16 blocks, 4 x 4 tokens, features)
    table.copy_(torch.randn_like(table))
    found = find_table(wrap(module, "nest"))
    assert found.shape[:2] == (16, 16)
    for row, column in [(0, 0), (0, 5), (5, 0), (15, 14)]:
        block, token = 4 * (row // 4) + column // 4, 4 * (row % 4) + column % 4
        torch.testing.assert_close(found[row, column], table[0, block, token])


def test_levit_biases_go_by_the_size_of_the_offset():
    module = timm.create_model("levit_128s", img_size=64)
    biases = {n: p for n, p in module.named_parameters() if n.endswith("attention_biases")}
    for parameter in biases.values():
        parameter.data.normal_()
    result = measure(wrap(module, "levit"))
    # Downsampling attends from fewer queries than keys, and has no such square of biases.
    assert len(result.layers) == len([n for n in biases if "downsample" not in n]) == 9
    table = biases[f"{result.layers[0]}.attention_biases"].detach().reshape(4, 4, 4)
    for dy, dx in [(0, 0), (1, -2), (-3, 3)]:
        np.testing.assert_allclose(
            result.bias[0, :4, result.bias.shape[2] // 2 + dy, result.bias.shape[3] // 2 + dx],
            table[:, abs(dy), abs(dx)], rtol=1e-6,
        )  # fmt: skip


def test_saved_and_loaded_draws_the_same(tmp_path):
    result = measure(["test_vit@random", "test_coatnet@random"])
    again = load_result(result.save(tmp_path / "p")[-1])
    np.testing.assert_array_equal(again.similarity, result.similarity)
    np.testing.assert_array_equal(again.plot().axes[0].images[0].get_array()[:10, :10],
                                  result.of(0)[0, 0])  # fmt: skip
    assert result.findings()[0].verdict == FAILS


def test_command(tmp_path, capsys):
    arguments = ["--models", "test_vit@random", "--grid", "4", "6", "--out", str(tmp_path)]
    assert position_embedding.main(arguments) == 0
    assert "position_embedding-test_vit-random.npz" in capsys.readouterr().out
    assert position_embedding.main([*arguments[:3], "0", "6", "--out", str(tmp_path)]) == 2
