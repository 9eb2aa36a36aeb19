"""CKA of models: against a plain loop, across models, and with what can go wrong."""

import math
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import VitprobeError, cka, load_result, wrap
from vitprobe.papers.raghu2021 import alike as vit_and_cnn
from vitprobe.results.result import FAILS, HOLDS, OPEN, decide


def vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_vit", img_size=32)


def resnet(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet")


def slow_cka(features_x, features_y, size):
    """Minibatch CKA by loops over examples, in float64: Nguyen et al. 2021, eq. 2 and 3."""

    def slow_hsic(k, m):
        n = len(k)
        trace = total_k = total_m = cross = 0.0
        for i in range(n):
            for j in range(n):
                if i == j:
                    continue
                trace += k[i, j] * m[j, i]
                total_k += k[i, j]
                total_m += m[i, j]
                cross += sum(k[l, i] * m[i, j] for l in range(n) if l != i)  # noqa: E741
        return (trace + total_k * total_m / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (
            n * (n - 3)
        )

    sums = np.zeros(3)
    for start in range(0, len(features_x), size):
        x, y = features_x[start : start + size], features_y[start : start + size]
        k, m = x @ x.T, y @ y.T
        sums += slow_hsic(k, m), slow_hsic(k, k), slow_hsic(m, m)
    return sums[0] / math.sqrt(sums[1] * sums[2])


def test_equals_a_slow_float64_loop_over_stored_features(tensors):
    a, b = vit(), resnet()
    result = cka.measure([a, b], tensors, batch_size=10, layers="blocks")
    stored = {}
    hooks = [
        module.register_forward_hook(
            lambda m, i, o, name=name: stored.setdefault(name, []).append(o.flatten(1).numpy())
        )
        for name, module in [("blocks.3", a.blocks[3]), ("layer2.0", b.layer2[0])]
    ]
    # The order is a permutation, which decides who shares a batch.
    order = np.random.default_rng(0).permutation(len(tensors))
    with torch.no_grad():
        a.double().eval()(tensors[order].double())
        b.double().eval()(tensors[order].double())
    for hook in hooks:
        hook.remove()
    x, y = (np.concatenate(stored[name]) for name in ("blocks.3", "layer2.0"))
    layers = list(result.layers)
    i, j = layers.index("blocks.3"), layers.index("layer2.0")
    assert result.cka[i, j] == pytest.approx(slow_cka(x, y, 10), abs=1e-5)
    assert result.cka[i, i] == pytest.approx(1, abs=1e-12)


def test_two_models_make_one_square_matrix_with_labels_on_their_rows(tensors):
    result = cka.measure([vit(), resnet()], tensors, batch_size=10)
    count = len(result.layers)
    assert result.cka.shape == result.cka_se.shape == (count, count)
    assert [str(n) for n in result.layers[result.model_of_layer == 0]] == [
        f"blocks.{i}" for i in range(6)
    ]
    np.testing.assert_allclose(result.cka, result.cka.T, atol=1e-12)
    np.testing.assert_array_equal(result.of(0, 1), result.of(1, 0).T)
    # Either model alone gives its own block: pairs do not depend on their company.
    alone = cka.measure(resnet(), tensors, batch_size=10)
    np.testing.assert_allclose(alone.cka, result.of(1), atol=1e-9)


def test_three_models_draw_a_grid_and_any_figure_shows_its_own_data(tensors):
    models = [vit(0), vit(1), resnet()]
    result = cka.measure(models, tensors, batch_size=10)
    assert result.models == ["VisionTransformer", "VisionTransformer #2", "ResNet"]
    figure = result.plot()
    panels = [ax for ax in figure.axes if ax.images and ax.get_title()]
    assert len(panels) == 9
    for ax in panels:
        a, _, b = ax.get_title().replace("\n", " ").partition(" × ")
        drawn = ax.images[0].get_array()
        np.testing.assert_array_equal(drawn, result.of(a, b or a))
        assert ax.images[0].origin == "lower"
        names = [text.get_text() for text in ax.get_yticklabels()]
        assert names == [
            str(n) for n in result.layers[result.model_of_layer == result.models.index(a)]
        ]
    assert len(cka.measure(vit(), tensors).plot().axes) == 2
    assert len([a for a in cka.measure(models[1:], tensors).plot().axes if a.get_title()]) == 3


def test_two_input_sizes_and_modes_restored(tensors):
    small, large = vit(), timm.create_model("test_vit2", img_size=64)
    small.train()
    large.eval()
    small.blocks[2].eval()
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)
    result = cka.measure([small, large], images, batch_size=8)
    assert [m["input_size"][1] for m in result.meta["models"]] == [32, 64]
    assert small.training and not small.blocks[2].training and not large.training
    assert small.blocks[1].training


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_a_last_batch_under_four_is_left_out_and_said(tensors, extra):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    images = tensors[: 4 + extra]  # two even batches would be under four
    order = np.random.default_rng(0).permutation(len(images))
    result = cka.measure(wrap(module), images, batch_size=4, layers="all")
    assert result.meta["left_out"] == extra and result.meta["n"] == 4
    assert f"{extra} images in batches under 4 left out" in result._caption()
    only = cka.measure(wrap(module), images[order[:4]], batch_size=4, layers="all")
    np.testing.assert_allclose(result.cka, only.cka, atol=1e-6)


def test_a_constant_layer_is_undefined_hatched_and_not_zero(tensors):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    nn.init.zeros_(module[1].weight)
    result = cka.measure(wrap(module), tensors, layers="all")
    undefined = np.isnan(result.cka)
    assert undefined[1].all() and undefined[:, 1].all() and undefined[2].all()
    assert not undefined[0, 0]
    figure = result.plot()
    assert figure.axes[0].patch.get_hatch()
    assert figure.axes[0].images[0].get_array().mask.sum() == undefined.sum()
    assert "Hatched: undefined" in result._caption()


def test_the_first_layer_that_is_not_finite_is_named(tensors):
    model = vit()
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[0, 0] = math.nan
    with pytest.raises(VitprobeError, match=r"layer blocks\.2 of VisionTransformer is not finite"):
        cka.measure(model, tensors)
    assert not model.blocks[0]._forward_hooks


def test_bfloat16_models_and_autocast_agree_with_float32_to_their_precision(tensors):
    exact = cka.measure(resnet(), tensors)
    half = cka.measure(resnet().bfloat16(), tensors)
    mixed = cka.measure(resnet(), tensors, precision="bf16")
    for other in (half, mixed):
        assert np.abs(other.cka - exact.cka).max() < 0.03
        assert not np.array_equal(other.cka, exact.cka)


def test_outputs_that_are_tuples_or_dicts(tensors):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.body(x)
            return {"map": x + 1, "both": (x.mean((2, 3)), x.relu())}

    result = cka.measure(wrap(Two(), name="two"), tensors, layers=["body", "output*"])
    assert [str(name) for name in result.layers] == [
        "body",
        "output['map']",
        "output['both'][0]",
        "output['both'][1]",
    ]
    assert result.cka[0, 1] == pytest.approx(1, abs=1e-6)


def test_standard_error_shrinks_with_images_and_covers_the_difference():
    module = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 5))
    images = torch.randn(512, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    whole = cka.measure(wrap(module), images, batch_size=16, layers="all")
    few = cka.measure(wrap(module), images, batch_size=16, layers="all", num_images=64)
    off = ~np.eye(3, dtype=bool)
    assert whole.cka_se[off].mean() < few.cka_se[off].mean() / 1.5
    assert (np.abs(whole.cka - few.cka)[off] < 5 * few.cka_se[off]).all()


def test_a_result_comes_back_and_draws_the_same(tensors, tmp_path):
    result = cka.measure([vit(), resnet()], tensors, batch_size=10)
    png, npz = result.save(tmp_path / "x", formats=["png"])
    again = load_result(npz)
    for name, array in result.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
    assert again.meta == result.meta
    assert again.findings() == result.findings() and len(result.findings()) == 2
    again.save(tmp_path / "y")
    assert (tmp_path / "y.png").read_bytes() == png.read_bytes()
    with np.load(npz, allow_pickle=False) as file:
        assert set(file.files) == {
            "cka", "cka_se", "layers", "model_of_layer", "null_q95", "null_max_q95", "meta",
        }  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_findings_follow_the_numbers(tensors, order):
    result = cka.measure([vit(), resnet()][::order], tensors, batch_size=5)
    pair = dict(result.meta["pairs"][0])
    values = result.of("ResNet")
    third = len(values) // 3
    assert pair["cnn"][0] == pytest.approx(values[:third, -third:].mean())
    best = result.of("VisionTransformer", "ResNet")[:, : (len(values) + 1) // 2].argmax(0)
    assert pair["match_depth"][0] == pytest.approx(best.mean() / 5)
    assert pair["match_depth"][1] > 0
    for spread, stages, verdict in [
        ([0.5, 0.01], [0.2, 0.01], HOLDS),
        ([0.05, 0.01], [0.2, 0.01], FAILS),
        ([0.5, 0.3], [0.2, 0.01], OPEN),
        ([0.5, 0.01], [-0.2, 0.01], FAILS),
        ([0.5, math.nan], [0.2, 0.01], OPEN),
    ]:
        result.meta["pairs"][0] = {**pair, "spread": spread, "stages": stages}
        assert result.findings()[0].verdict == verdict
    assert decide(1.0, 0.0, 1.0) == OPEN


def test_an_error_from_few_batches_decides_less(tensors):
    # Student's t at the confidence of two standard errors: 13.97 for two replicates, 3.31 for four.
    assert decide(3.0, 1.0) == decide(3.0, 1.0, replicates=1000) == HOLDS
    assert decide(-3.2, 1.0, replicates=4) == decide(13.9, 1.0, replicates=2) == OPEN
    assert decide(-3.4, 1.0, replicates=4) == FAILS
    assert decide(14.0, 1.0, replicates=2) == HOLDS
    result = cka.measure([vit(), resnet()], tensors, batch_size=10)
    assert result.meta["replicates"] == 2
    pair = dict(result.meta["pairs"][0], spread=[0.5, 0.1], stages=[0.5, 0.01])
    for replicates, verdict in ((2, OPEN), (20, HOLDS)):
        result.meta.update(replicates=replicates, pairs=[pair])
        assert result.findings()[0].verdict == verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 3}, "3 images of a tensor are too few: at least 4"),
        ({"num_images": 21}, "--num-images: a tensor has 20 images, not 21"),
        ({"batch_size": 3}, "batches of at least 4 images"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"layers": "blocs.*"}, "no layer 'blocs.*'"),
        ({"precision": "fp8"}, "--precision must be"),
        ({"device": "gpu"}, "--device: 'gpu' is not available"),
    ],
)
def test_wrong_options_get_one_line(tensors, options, message):
    with pytest.raises(VitprobeError, match=re.escape(message)) as caught:
        cka.measure(resnet(), tensors, **options)
    assert "\n" not in str(caught.value)


def test_a_module_without_a_transform_says_how_to_give_one(pictures):
    with pytest.raises(VitprobeError, match=r"has no transform: pass wrap\("):
        cka.measure(nn.Conv2d(3, 3, 1), pictures)
    with pytest.raises(VitprobeError, match=r"must be a name or an nn.Module, not int"):
        cka.measure([3], pictures)


def test_a_map_that_only_fades_with_depth_has_no_stages():
    depth = torch.arange(6.0, dtype=torch.float64)
    fading = 1 - 0.1 * (depth[:, None] - depth).abs()
    stages = [(8, 8)] * 3 + [(4, 4)] * 3
    assert abs(float(vit_and_cnn._stage_split(fading, stages))) < 1e-12
    split = torch.block_diag(*[torch.full((3, 3), 0.6, dtype=torch.float64)] * 2) + 0.3
    assert float(vit_and_cnn._stage_split(split, stages)) == pytest.approx(0.6)
    assert vit_and_cnn._stage_split(fading, [(8, 8)] * 6).isnan()
