"""Which tensors are layers, their labels and order, and that captures keep to the images."""

import pytest
import timm
import torch
from torch import nn

from vitprobe.errors import VitprobeError
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import map_layers


def mapped(module, size=32, **options):
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return map_layers("net", module.eval(), example, **options)


def captured(module, layers, x):
    """What every layer was at the moment it existed, by label."""
    kept = {}
    with (
        capture(module, layers, lambda i, t: kept.__setitem__(layers[i].label, t.clone())),
        torch.no_grad(),
    ):
        module(x)
    return kept


class Shuffler(nn.Module):
    """Rows along the first axis are tokens of different images."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Identity()
        self.head = nn.Linear(3 * 32 * 32, 4)

    def forward(self, x):
        mixed = self.mix(x.flatten(1).view(len(x) * 4, -1).roll(1, 0))
        return self.head(mixed.roll(-1, 0).reshape(len(x), -1))


class Forms(nn.Module):
    """Outputs of all shapes; a module called twice; one that never runs; tokens first."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.twice = nn.ReLU()
        self.idle = nn.Linear(3, 3)
        self.pair = Pair()
        self.tokens_first = nn.Linear(8, 8)

    def forward(self, x):
        x = self.twice(self.twice(self.stem(x)) - 0.1)
        pair = self.pair(x)
        tokens = self.tokens_first(pair["map"].flatten(2).permute(2, 0, 1))
        return {"tokens": tokens, "others": (pair["pooled"], None, 3)}


class Pair(nn.Module):
    def forward(self, x):
        return {"map": x * 2, "pooled": x.mean((2, 3))}


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def test_blocks_are_the_residual_stream_after_each_block():
    def names(name, **options):
        model = timm.create_model(name, **options)
        return [layer.label for layer in mapped(model).choose("blocks")]

    assert names("test_vit", img_size=32) == [f"blocks.{i}" for i in range(6)]
    resnet = names("resnet18")
    assert resnet == [f"layer{s}.{b}" for s in range(1, 5) for b in range(2)]
    # EfficientNet's strided blocks have no skip and are blocks all the same.
    efficientnet = timm.create_model("efficientnet_b0")
    blocks = [n for n, m in efficientnet.named_modules() if n.count(".") == 2 and "blocks." in n
              and n.split(".")[1].isdigit() and n.split(".")[2].isdigit()]  # fmt: skip
    assert [la.label for la in mapped(efficientnet).choose("blocks")] == blocks
    vgg = names("vgg11")
    assert vgg and all(name.startswith("features.") for name in vgg)


@pytest.mark.parametrize(
    ("name", "options", "each", "others"),
    [
        # LN1, MSA, sum, LN2, MLP hidden, sum in each of 6 blocks; patch embedding, final norm.
        ("test_vit", {"img_size": 32}, 6 * 6, 2),
        # Seven a bottleneck, two a projection (the first block of each stage), two of the stem.
        ("resnet50", {}, 16 * 7, 4 * 2 + 2),
    ],
)
def test_paper_gives_the_papers_axis_lengths(name, options, each, others):
    layers = mapped(timm.create_model(name, **options)).choose("paper")
    assert len(layers) == each + others


def test_paper_names_the_six_of_a_transformer_block_in_order():
    layers = mapped(timm.create_model("test_vit", img_size=32)).choose("paper")
    labels = [layer.label for layer in layers if layer.label.startswith("blocks.1")]
    assert labels == [
        "blocks.1.norm1",
        "blocks.1.attn",
        "blocks.1 sum 1",
        "blocks.1.norm2",
        "blocks.1.mlp hidden",
        "blocks.1 sum 2",
    ]


def test_every_capture_is_what_a_plain_forward_pass_computes():
    model = timm.create_model("test_vit", img_size=32).eval()
    x = torch.randn(3, 3, 32, 32)
    layers = mapped(model).choose(["paper", "blocks"])
    kept = captured(model, layers, x)
    block = model.blocks[1]
    with torch.no_grad():
        stream = kept["blocks.0"]
        attended = stream + block.attn(block.norm1(stream))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(attended)))
        out = attended + block.mlp(block.norm2(attended))
    torch.testing.assert_close(kept["blocks.1 sum 1"], attended)
    torch.testing.assert_close(kept["blocks.1.mlp hidden"], hidden)
    torch.testing.assert_close(kept["blocks.1 sum 2"], out)
    torch.testing.assert_close(kept["blocks.1"], out)
    assert list(kept) == [layer.label for layer in layers]


def test_all_repeats_no_tensor():
    model = timm.create_model("test_vit", img_size=32)
    layers = mapped(model).choose("all")
    kept = captured(model, layers, torch.randn(2, 3, 32, 32))
    # Passed through by Identity and by Dropout in evaluation mode.
    assert not any(label.endswith(("drop1", "drop2", "ls1", "drop_path1")) for label in kept)
    values = [value.flatten() for value in kept.values()]
    equal = [
        (a, b)
        for a in range(len(values))
        for b in range(a)
        if len(values[a]) == len(values[b]) and torch.equal(values[a], values[b])
    ]
    assert not equal


def test_an_in_place_relu_does_not_rewrite_the_layer_before_it():
    model = InPlace()
    layers = mapped(model).choose("all")
    assert [layer.label for layer in layers] == ["conv", "norm", "act"]
    kept = captured(model, layers, torch.randn(4, 3, 32, 32))
    assert (kept["norm"] < 0).any() and not (kept["act"] < 0).any()
    torch.testing.assert_close(kept["norm"].relu(), kept["act"])


def test_a_container_beside_its_child_is_listed_once_but_found_by_either_name():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()), nn.Flatten())
    everything = mapped(model)
    assert [layer.label for layer in everything.choose("all")] == ["0.0"]
    assert [layer.label for layer in everything.choose("0")] == ["0"]


def test_tuples_dicts_repeated_calls_and_tokens_first():
    model = Forms()
    everything = mapped(model)
    labels = [layer.label for layer in everything.choose("all")]
    assert labels == ["stem", "twice:1", "twice:2", "pair['map']", "pair['pooled']", "tokens_first"]
    x = torch.randn(5, 3, 32, 32)
    kept = captured(model, everything.choose(["all", "output*"]), x)
    assert all(len(value) == 5 for value in kept.values())
    assert kept["tokens_first"].shape == (5, 64, 8)
    torch.testing.assert_close(kept["pair['map']"], 2 * kept["twice:2"])
    with pytest.raises(VitprobeError, match=r"idle of net never ran"):
        everything.choose("idle")
    with pytest.raises(VitprobeError, match=r"no layer 'stam'. Did you mean stem"):
        everything.choose("stam")


def test_rows_of_mixed_images_are_no_layer():
    everything = mapped(Shuffler())
    assert [layer.label for layer in everything.choose("all")] == ["head"]
    with pytest.raises(VitprobeError, match="mix of net has no rows that belong to one image"):
        everything.choose("mix")


def test_windows_folded_into_the_batch_come_back_to_their_images():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=16,
        depths=(2, 2), num_heads=(2, 2),
    ).eval()  # fmt: skip
    layers = mapped(model, 56).choose("layers.0.blocks.1.attn")
    x = torch.randn(3, 3, 56, 56)
    together = captured(model, layers, x)["layers.0.blocks.1.attn"]
    for i in range(3):
        alone = captured(model, layers, x[i : i + 1])["layers.0.blocks.1.attn"]
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_after_success_and_after_an_exception():
    model = timm.create_model("test_vit", img_size=32).eval()
    layers = mapped(model).choose(["paper"])

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    captured(model, layers, torch.randn(2, 3, 32, 32))
    assert hooks() == 0

    def fail(i, tensor):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(model, layers, fail):
        model(torch.randn(2, 3, 32, 32))
    assert hooks() == 0


def test_a_layer_that_does_not_run_in_a_later_pass_is_an_error():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.skip = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), False

        def forward(self, x):
            return self.a(x) if self.skip else self.b(self.a(x))

    model = Sometimes()
    layers = mapped(model).choose("all")
    model.skip = True
    with pytest.raises(VitprobeError, match="The layer b did not run"):
        captured(model, layers, torch.randn(2, 3, 8, 8))


class SoftmaxModule(nn.Module):
    """Attention whose softmax is a module, which returns the map; the map beside the output."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.attend = nn.Sequential(nn.Softmax(-1), nn.Dropout(0.1))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = self.attend(q @ k.mT)
        return self.out(weights @ v), weights


class PatchesThenAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.attention = (
            nn.Conv2d(3, 8, 8, 8),
            nn.LayerNorm(8),
            SoftmaxModule(),
        )

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        return x + self.attention(self.norm(x))[0]


def test_paper_takes_what_the_attention_puts_out_and_not_its_map():
    layers = mapped(PatchesThenAttention()).choose("paper")
    assert [layer.label for layer in layers] == ["patch", "norm", "attention[0]", "output sum"]
