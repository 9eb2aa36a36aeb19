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
from vitprobe.position_embedding import measure, similarity
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.statistics.grids import axis_gain, decay
from vitprobe.tracing.positions import by_offset, find_positions, resample


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
    assert decay(result.similarity)[0] < -0.8
    assert result.findings()[0].verdict == HOLDS


def test_rows_and_columns_stand_out_where_the_table_is_a_sum_of_theirs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 1, 256, generator=generator)
    columns = torch.randn(1, 6, 256, generator=generator)
    assert axis_gain(similarity(rows + columns))[0] == pytest.approx(0.5, abs=0.1)
    noise = torch.randn(6, 6, 256, generator=generator)
    assert axis_gain(similarity(noise))[0] == pytest.approx(0, abs=0.05)


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


class Embeds(nn.Module):
    """Patches with a table under some name, in some module; ``wanted`` is what to find."""

    def __init__(self, name="pos_embedding", size=(32, 48), before=1, behind=0, form="parameter"):
        super().__init__()
        self.project = nn.Conv2d(3, 8, 8, 8)
        grid = size[0] // 8, size[1] // 8
        count = grid[0] * grid[1]
        table = torch.randn(1, before + count + behind, 8)
        self.wanted = table[0, before : before + count].reshape(*grid, 8)
        self.holder, self.name = nn.Module(), name
        if form == "buffer":
            self.holder.register_buffer(name, table)
        else:
            setattr(self.holder, name, table if form == "attribute" else nn.Parameter(table))
        self.extra = nn.ParameterList(torch.randn(1, n, 8) for n in (before, behind))
        self.text_positions = nn.Parameter(torch.randn(count, 8))  # of another tower
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.project(x).flatten(2).mT
        before, behind = (one.expand(len(x), -1, -1) for one in self.extra)
        return torch.cat([before, x, behind], 1) + getattr(self.holder, self.name) + self.bias


@pytest.mark.parametrize("name", ["pos_embed", "patch_positions", "grid_code", "weights"])
@pytest.mark.parametrize("form", ["parameter", "buffer", "attribute"])
def test_a_table_is_what_is_added_to_the_tokens_whatever_its_name(name, form):
    module = Embeds(name, before=2, behind=1, form=form)
    result = measure(wrap(module, "made", input_size=(3, 32, 48)))
    assert [table["grid"] for table in result.meta["tables"]] == [[4, 6]]
    held = "output" if form == "attribute" else f"holder.{name}"
    assert result.meta["tables"][0]["name"] == held
    np.testing.assert_allclose(result.of(0), similarity(module.wanted), atol=1e-6)


def test_without_a_word_the_size_is_one_that_the_module_runs_at():
    module = Embeds(size=(96, 96))
    assert measure(wrap(module, "made")).meta["tables"][0]["grid"] == [12, 12]
    module = Embeds(size=(40, 24))
    module.config = type("Config", (), {"image_size": (40, 24)})
    assert measure(wrap(module, "made")).meta["tables"][0]["grid"] == [5, 3]
    with pytest.raises(VitprobeError, match=r"runs at none of the usual sizes .* input_size="):
        measure(wrap(Embeds(size=(40, 24)), "made"))
    with pytest.raises(VitprobeError, match="made cannot run on images of 3 × 32 × 32"):
        measure(wrap(Embeds(size=(40, 24)), "made", input_size=(3, 32, 32)))


def test_a_table_of_rows_and_one_of_columns_are_shown_as_their_sum():
    class Axial(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Conv2d(3, 8, 8, 8)
            self.down, self.along = nn.Parameter(torch.randn(8, 4, 1)), nn.Embedding(6, 8)

        def forward(self, x):
            x = self.project(x) + self.down
            x = x + self.along(torch.arange(6)).T[:, None]
            return x.flatten(2).mT

    module = Axial()
    result = measure(wrap(module, "axial", input_size=(3, 32, 48)))
    assert [(t["name"], t["grid"]) for t in result.meta["tables"]] == [
        ("down + along.weight", [4, 6])
    ]
    table = (module.down + module.along.weight.T[:, None]).permute(1, 2, 0)
    np.testing.assert_allclose(result.of(0), similarity(table), atol=1e-6)


def test_a_model_comes_back_in_the_mode_that_it_had():
    module = Embeds().train()
    module.project.eval()
    measure(wrap(module, "made", input_size=(3, 32, 48)))
    assert module.training and not module.project.training


def test_numbers_that_are_no_positions_are_no_table():
    class Others(nn.Module):
        """Adds to channels, to rows of another order, to the image, and multiplies tokens."""

        def __init__(self):
            super().__init__()
            self.project, self.mix = nn.Conv2d(3, 8, 8, 8), nn.Linear(16, 16)
            self.shift = nn.Parameter(torch.randn(1, 3, 32, 32))
            self.gate, self.hidden = (nn.Parameter(torch.randn(1, 16, 8)) for _ in range(2))
            self.channel = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x):
            x = (self.project(x + self.shift) + self.channel).flatten(2).mT * self.gate
            return x + self.mix(x.mT).mT.add(self.hidden).relu()

    with pytest.raises(VitprobeError, match="others has no position embedding to show"):
        measure(wrap(Others(), "others", input_size=(3, 32, 32)))


def test_tables_on_maps_and_of_several_stages():
    pit = timm.create_model("pit_ti_224", img_size=64)
    rows, columns = pit.pos_embed.shape[-2:]
    assert measure(wrap(pit, "pit")).similarity.shape[:2] == (rows, columns)

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)
            self.table1 = nn.Parameter(torch.randn(8, 8, 8))
            self.table2 = nn.Parameter(torch.randn(1, 4, 4, 8))

        def forward(self, x):
            x = self.table1 + self.first(x)
            x = self.second(x).permute(0, 2, 3, 1)
            x += self.table2
            return x + self.table2  # the same once more

    module = Stages()
    result = measure(wrap(module, "stages", input_size=(3, 32, 32)), grid=(2, 3))
    assert [(t["name"], t["grid"]) for t in result.meta["tables"]] == [
        ("table1", [8, 8]), ("table1", [2, 3]), ("table2", [4, 4]), ("table2", [2, 3]),
    ]  # fmt: skip
    assert result.meta["tables"][0]["label"] == "stages, table1, 8 × 8"
    expected = similarity(module.table1.permute(1, 2, 0))
    np.testing.assert_allclose(result.of(0), expected, atol=1e-6)
    np.testing.assert_allclose(result.of(2), similarity(module.table2[0]), atol=1e-6)


def test_a_table_that_is_one_block_after_another():
    module = nest.Nest(img_size=64, embed_dims=(8, 8, 8), num_heads=(1, 1, 1), depths=(1, 1, 1))
    table = module.levels[0].pos_embed.detach()  # (1, 16 blocks, 4 x 4 tokens, features)
    table.copy_(torch.randn_like(table))
    found = find_positions(module.eval(), torch.randn(1, 3, 64, 64)).tables[0][1]
    assert found.shape[:2] == (16, 16)
    for row, column in [(0, 0), (0, 5), (5, 0), (15, 14)]:
        block, token = 4 * (row // 4) + column // 4, 4 * (row % 4) + column % 4
        torch.testing.assert_close(found[row, column], table[0, block, token])


class Attends(nn.Module):
    """Attention among all tokens with a bias, in several ways of writing it."""

    def __init__(self, way, side=4, heads=2):
        super().__init__()
        self.way, self.heads, self.side = way, heads, side
        self.project = nn.Conv2d(3, 8, 8, 8)
        self.table = nn.Parameter(torch.randn(heads, 2 * side - 1, 2 * side - 1))
        index = torch.arange(side * side)
        self.dy = (index[None] // side - index[:, None] // side) + side - 1
        self.dx = (index[None] % side - index[:, None] % side) + side - 1
        self.pairs = nn.Parameter(torch.randn(heads, side**2, side**2))
        self.joint = nn.MultiheadAttention(8, heads, batch_first=True)
        hidden = torch.zeros(side**2, side**2).masked_fill(torch.rand(side**2, side**2) < 0.5, -100)
        self.hidden = hidden

    def forward(self, x):
        x = self.project(x).flatten(2).mT
        bias = self.table[:, self.dy, self.dx]
        q = k = v = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.way == "a head at a time":
            parts = []
            for h in range(self.heads):
                scores = q[:, h] @ k[:, h].mT + bias[h]
                parts.append(scores.softmax(-1) @ v[:, h])
            return torch.cat(parts, -1)
        if self.way == "fused":
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        if self.way == "module":
            return self.joint(x, x, x, attn_mask=bias)[0]
        if self.way == "baddbmm":
            q, k, v = (one.flatten(0, 1) for one in (q, k, v))
            return torch.baddbmm(bias, q, k.mT).softmax(-1) @ v
        if self.way == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k * 0.5)
            scores = bias + scores
            return torch.einsum("bhij,bhjd->bhid", nn.Softmax(-1)(scores), v)
        scores = q @ k.transpose(-2, -1) * 0.5
        if self.way == "in place":
            scores += bias
        elif self.way == "in two parts":
            scores = (scores + bias * 0.25) + bias * 0.75
        elif self.way == "before a mask":
            scores = scores + bias[None]
            scores = scores.view(len(x), 1, *scores.shape[1:]) + self.hidden.fill_diagonal_(0)
            scores = scores.flatten(0, 1)
        elif self.way == "after the softmax":
            return (scores.softmax(-1) + bias) @ v
        elif self.way == "of pairs":
            scores = scores + self.pairs
        return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "way", ["fused", "module", "baddbmm", "einsum", "in place", "in two parts", "before a mask",
    "a head at a time"]
)  # fmt: skip
def test_a_bias_is_what_is_added_to_scores_however_it_is_written(way):
    torch.manual_seed(0)
    module = Attends(way)
    result = measure(wrap(module, "made", input_size=(3, 32, 32)))
    assert result.layers.tolist() == ["joint" if way == "module" else "output"]
    np.testing.assert_allclose(result.bias[0], module.table.detach(), rtol=1e-5)


@pytest.mark.parametrize("way", ["after the softmax", "of pairs", "none"])
def test_what_is_added_elsewhere_or_to_pairs_as_they_come_is_no_bias_by_offset(way):
    with pytest.raises(VitprobeError, match="no relative-position bias"):
        measure(wrap(Attends(way), "made", input_size=(3, 32, 32)))


def test_the_bias_of_shifted_windows_is_told_from_their_mask():
    module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2,), num_heads=(2,), embed_dim=12
    )
    for fused in (False, True):
        for block in module.layers[0].blocks:
            block.attn.fused_attn = fused
            block.attn.relative_position_bias_table.data.normal_()
        result = measure(wrap(module, "swin"))
        assert len(result.layers) == 2
        for found, block in zip(result.bias, module.layers[0].blocks):
            table = block.attn.relative_position_bias_table.detach().T.reshape(2, 13, 13)
            np.testing.assert_allclose(found, table.flip(1, 2), atol=1e-6)


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


class GlobalQueries(nn.Module):
    """Queries pooled from the whole map, for the keys of each window of 2 × 2, with a bias."""

    def __init__(self):
        super().__init__()
        self.patch, self.pool = nn.Conv2d(3, 4, 4, 4), nn.AvgPool2d(2)
        self.table = nn.Parameter(torch.randn(9))
        y, x = np.divmod(np.arange(4), 2)
        self.index = (y[None] - y[:, None] + 1) * 3 + x[None] - x[:, None] + 1

    def forward(self, x):
        x = self.patch(x)
        n, c, h, w = x.shape
        query = self.pool(x).flatten(2).mT[:, None].expand(-1, 4, -1, -1).flatten(0, 1)
        keys = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        return (query @ keys.mT + self.table[self.index]).softmax(-1) @ keys


def test_biases_of_queries_for_the_whole_image_are_by_the_offset_on_the_grid():
    torch.manual_seed(0)
    net = GlobalQueries().eval()
    ((_, found),) = find_positions(net, torch.randn(1, 3, 16, 16)).biases
    np.testing.assert_allclose(found[0], net.table.detach().reshape(3, 3), atol=1e-6)
