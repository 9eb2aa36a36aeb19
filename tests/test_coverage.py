"""What the measurements find in published families, against counts from the families' sources."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import vitprobe
from vitprobe import attention_distance, cka, receptive_field, skip_ratio
from vitprobe.tracing.attention import map_attention
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.trace import record

SCRIPT = Path(__file__).parents[1] / "analyses" / "coverage.py"


@pytest.fixture(scope="module")
def table():
    """The script; not by its name, which a package that measures tests has too."""
    if not SCRIPT.exists():
        pytest.skip("the script is not part of the installed package")
    pytest.importorskip("resource", reason="the script limits its processes")
    spec = importlib.util.spec_from_file_location("coverage_of_timm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(SCRIPT.parent))  # where it finds what scripts share
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


VIT = {"depth": 2}
# Heads of each attention layer over places, and residual additions, as the source in timm.models
# has them; where a depth is given, it is a part of the published one.
FAMILIES = {
    # vision_transformer.Block adds twice.
    "vit_tiny_patch16_224": (32, {}, 12 * [3], 24),
    "deit_tiny_distilled_patch16_224": (32, VIT, 2 * [3], 4),
    "beit_base_patch16_224": (32, VIT, 2 * [12], 4),
    "eva02_tiny_patch14_224": (28, VIT, 2 * [3], 4),
    "vit_small_patch14_dinov2": (28, VIT, 2 * [6], 4),
    "vit_small_patch16_dinov3": (32, VIT, 2 * [6], 4),
    "vit_base_patch32_clip_224": (64, VIT, 2 * [12], 4),
    # The pooling token's MLP has a skip of its own; its attention has no query in the picture.
    "vit_base_patch16_siglip_224": (32, VIT, 2 * [12], 4 + 1),
    # depths 2 2 6 2, heads 3 6 12 24.
    "swin_tiny_patch4_window7_224": (64, {}, 2 * [3] + 2 * [6] + 6 * [12] + 2 * [24], 24),
    "swinv2_tiny_window8_256": (64, {}, 2 * [3] + 2 * [6] + 6 * [12] + 2 * [24], 24),
    # depths 2 2 2 2, heads 1 2 5 8.
    "pvt_v2_b0": (64, {}, 2 * [1] + 2 * [2] + 2 * [5] + 2 * [8], 16),
    # depths 1 2 5 2; a block adds twice, and its attention adds the pooled query.
    "mvitv2_tiny": (64, {}, [1] + 2 * [2] + 5 * [4] + 2 * [8], 3 * 10),
    # One MBConv, a block and a grid of attention a stage: 1 + 2 + 2 additions; 32 channels a head.
    "test_maxvit": (64, {}, [1, 1, 2, 2, 3, 3, 4, 4], 4 * 5),
    # Two stages of one convolution, then depths 2 1 of transformers; 32 incoming channels a head.
    "test_coatnet": (64, {}, [2, 3, 3], 2 + 2 * 3),
    # Transformers of depth 2 3 4 are those of three blocks; inverted residuals: 1 + 2 have a skip.
    "mobilevit_xxs": (64, {}, 9 * [4], 2 * 9 + 3),
    # Separable attention weighs places without queries; 1 inverted residual has a skip.
    "mobilevitv2_050": (64, {}, [], 2 * 9 + 1),
    # Attention over channels; a block adds three times, a class block twice.
    "xcit_nano_12_p16_224": (32, VIT, [], 3 * 2 + 2 * 2),
    # Talking heads mix their maps; the first class token does not depend on the picture.
    "cait_xxs24_224": (32, VIT, [], 2 * 2 + 2 * 2 - 1),
    # depths 2 3 4 of heads 4 6 8, and 128 / 16 and 256 / 16 in the downsampling between, whose
    # attention has no skip.
    "levit_128s": (128, {}, 2 * [4] + [8] + 3 * [6] + [16] + 4 * [8], 2 * 9 + 2),
    # depths 3 2 6 4, the last block of which attends.
    "efficientformer_l1": (224, {}, [8], 2 * 15),
    # depths 2 2 4 2 of a token mixer and an MLP, without attention.
    "fastvit_t8": (64, {}, [], 2 * 10),
    "convnext_atto": (32, {}, [], 2 + 2 + 6 + 2),
    "resnet18": (32, {}, [], 8),
    "resnet50": (32, {}, [], 3 + 4 + 6 + 3),
    "resnetv2_50": (32, {}, [], 3 + 4 + 6 + 3),
    "regnety_002": (32, {}, [], 1 + 1 + 4 + 7),
    # depths 1 2 2 3 3 4 1: all but the first of a stage have a skip.
    "efficientnet_b0": (32, {}, [], 0 + 1 + 1 + 2 + 2 + 3 + 0),
    # Stages of 2 blocks; one of stage 3 and both of stage 4 attend.
    "halonet26t": (256, {}, 3 * [8], 8),
    "botnet26t_256": (128, {}, 3 * [4], 8),
    "mixer_s16_224": (32, {}, [], 2 * 8),
    # Sums that are no residuals in part: scales of a split tensor, cascades of heads, cells.
    "res2net50_14w_8s": (32, {}, [], 16),
    "efficientvit_m0": (128, {}, 6 * 4 * [1], 2 * 6 * 2 + 2 * 2 * 3 + 2),
    "tnt_s_legacy_patch16_224": (32, VIT, [4, 6] * 2, 2 * 4),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_the_source(name):
    side, options, heads, additions = FAMILIES[name]
    try:
        model = timm.create_model(name, img_size=side, **options).eval()
    except TypeError:  # convolutional networks take any size
        model = timm.create_model(name, **options).eval()
    images = torch.randn(2, 3, side, side)
    assert [layer.heads for layer in map_attention(name, model, images).layers] == heads
    assert len(record(model, images[:1]).additions) == additions


# Modules from elsewhere, with what their constructors say: layers of attention x heads, additions.
def resnet50():
    return torchvision.models.resnet50(), [], 16


def vit():
    return torchvision.models.VisionTransformer(32, 16, 3, 4, 48, 96), 3 * [4], 6


def swin():
    module = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7])
    return module, 2 * [2] + 2 * [4], 8


@pytest.mark.parametrize("build", [resnet50, vit, swin])
def test_modules_of_torchvision(build):
    module, heads, additions = build()
    model = vitprobe.wrap(module.eval(), name="theirs")
    side = 64 if build is swin else 32
    images = torch.randn(4, 3, side, side)
    assert len(record(model.module, images[:1]).additions) == additions
    assert [la.heads for la in map_attention("theirs", model.module, images[:2]).layers] == heads
    cka.measure(model, images, batch_size=4)
    skip_ratio.measure(model, images, batch_size=4)
    receptive_field.measure(model, images, channels=1, num_images=1)
    if heads:
        attention_distance.measure(model, images, batch_size=4)


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass", "nested"])
def test_outputs_of_several_tensors(form):
    @dataclass
    class Output:
        logits: torch.Tensor
        hidden: tuple[torch.Tensor, ...]

    forms = {
        "tuple": lambda y: (y.mean(1), y),
        "dict": lambda y: {"logits": y.mean(1), "last": y},
        "dataclass": lambda y: Output(y.mean(1), (y,)),
        "nested": lambda y: {"all": [(y.mean(1), None)], "last": y},
    }

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = timm.create_model("test_vit", img_size=32)

        def forward(self, x):
            return forms[form](self.inner.forward_features(x))

    model = vitprobe.wrap(Several().eval())
    images = torch.randn(4, 3, 32, 32)
    plain = attention_distance.measure(model.module.inner, images, batch_size=4)
    same = attention_distance.measure(model, images, batch_size=4)
    assert (same.distance_px == plain.distance_px).all()
    assert len(skip_ratio.measure(model, images, batch_size=4).layers) == 12
    assert len(cka.measure(model, images, batch_size=4).layers) == 6
    receptive_field.measure(model, images, channels=1, num_images=1)


def test_a_model_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = vitprobe.wrap(transformers.ViTModel(config).eval())
    images = torch.randn(4, 3, 32, 32)
    assert len(record(model.module, images[:1]).additions) == 4
    assert [la.heads for la in map_attention("vit", model.module, images[:2]).layers] == [3, 3]
    cka.measure(model, images, batch_size=4)
    attention_distance.measure(model, images, batch_size=4)


NO_ATTENTION = {"attention_distance", "attention_rollout"}
# Ten small models, and what their sources do not have: maps of several sizes or windows have no
# rollout, relative positions are shown as biases, LCNet's blocks have no skip, and each of the
# test EfficientNet's changes channels (24 to 16) or strides.
LACKS = {
    "test_vit": set(),
    "test_resnet": NO_ATTENTION | {"position_embedding"},
    "test_convnext": NO_ATTENTION | {"position_embedding"},
    "test_efficientnet": NO_ATTENTION | {"position_embedding", "skip_ratio", "skip_ablation"},
    "test_byobnet": NO_ATTENTION | {"position_embedding"},
    "mixer_s32_224": NO_ATTENTION | {"position_embedding"},
    "test_maxvit": {"attention_rollout"},
    "mobilevit_xxs": {"attention_rollout", "position_embedding"},
    "pvt_v2_b0": {"attention_rollout", "position_embedding"},
    "lcnet_035": NO_ATTENTION | {"position_embedding", "skip_ratio", "skip_ablation"},
}


@pytest.mark.parametrize("name", LACKS)
def test_every_measurement_on_ten_models(table, name):
    row = table.row("module", name)
    found = {measurement: table.status(row, measurement) for measurement in table.MEASUREMENTS}
    lacks = {measurement for measurement, status in found.items() if status == table.ABSENT}
    assert lacks == LACKS[name]
    assert {m for m, status in found.items() if status == table.NO} == set()


def test_a_run_goes_on_and_writes_what_was_found(table, tmp_path, monkeypatch):
    row = dict.fromkeys(table.COLUMNS, "") | dict.fromkeys(table.MEASUREMENTS, "yes")
    rows = [
        row | {"module": "one", "model": "a", "attention_rollout": "no: Error: it broke"},
        row | {"module": "two", "model": "b", "cka": f"{table.ABSENT}: b (random) has no map."},
    ]
    with (tmp_path / "coverage.partial.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    arguments = ["coverage.py", "--modules", "one", "two", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    table.main()
    assert {path.name for path in tmp_path.iterdir()} == {"coverage.csv", "coverage.md"}
    assert list(csv.DictReader((tmp_path / "coverage.csv").open())) == rows
    text = (tmp_path / "coverage.md").read_text()
    assert "| yes | 1 | 2 | 2 | 1 |" in text
    assert "- attention_rollout: Error: it broke (1: one)" in text
    assert "- cka: MODEL has no map. (1: two)" in text


@pytest.mark.parametrize(
    ("name", "side", "elsewhere"),
    [
        ("test_vit", 32, []),
        ("test_resnet", 64, [("act1", "the stem, before the first block")]),
        # A cross stage joins its blocks' output with the other half of the channels.
        (
            "cspresnet50",
            64,
            [("stem.conv1", "the stem, before the first block")]
            + [(f"stages.{i}", "weights behind a block: a transition, a fusion, a final "
                "convolution") for i in range(4)],
        ),
    ],
)  # fmt: skip
def test_tensors_of_feature_info_are_blocks_or_it_is_said_what_they_are(
    table, name, side, elsewhere
):
    model = timm.create_model(name, **({"img_size": side} if name == "test_vit" else {}))
    layers = map_layers(name, model.eval(), torch.randn(2, 3, side, side))
    number, found = table.features(layers)
    assert number == len(model.feature_info) and found == elsewhere


def test_a_network_that_cannot_be_watched_has_its_line_in_the_table_of_others(table):
    row = table.row_beyond("torch: test_vit, torch.jit.trace")
    assert {table.status(row, m) for m in (*table.MEASUREMENTS, *table.LATER)} == {table.NO}
    text = table.markdown([], [row])
    assert "## Beyond timm" in text
    assert "is TorchScript, which runs where its layers cannot be watched" in text


def test_a_model_that_breaks_is_a_no_with_its_reason(table):
    def fail():
        raise ValueError("it\nbroke")

    assert table.outcome(fail) == "no: ValueError: it"
