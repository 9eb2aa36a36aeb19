"""Every measurement on networks made like trained ones, against slow float64 computations.

The references start from the activations of the very pass that was measured, so a tolerance is
that of the measurement's own arithmetic. ``U`` is the unit roundoff of float32, in which products
are made; totals over images are float64 everywhere.

CKA: products are off by U each; a piece's Gram may be 20 times what is left of it once it is
centred (``MEAN_ALLOWED``), and errors of d products add up to 8√d of them at most, relative to the
root of d of their squares: 20 · 8 · U = 1e-5.
Norms, their ratios and cosines: 8√d · U of d products, d = 32: 3e-6.
Attention: a score of d products is off by 8√d · U · |q||k|/√d, its probability by as large a share.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from by_hand import slow_cka, slow_probe
from hard_family import (
    BATCH,
    CNNS,
    GRID,
    HEADS,
    PARTS,
    PATCH,
    VITS,
    WIDTH,
    N,
    Recorder,
    hard_cnn,
    hard_vit,
    images,
)  # fmt: skip

from vitprobe import (
    attention_distance,
    attention_rollout,
    cka,
    head_subsets,
    linear_probe,
    localization,
    patch_embedding,
    position_embedding,
    receptive_field,
    skip_ablation,
    skip_ratio,
    token_norms,
    wrap,
)
from vitprobe.images.sources import Images, TensorSource

U = 2.0**-24
CKA_TOLERANCE = 20 * 8 * U
NORM_TOLERANCE = 8 * math.sqrt(WIDTH) * U
OPTIONS = {"batch_size": BATCH, "quiet": True}
vits = pytest.mark.parametrize("kind", VITS)
cnns = pytest.mark.parametrize("kind", CNNS)


def seen(net, names, measure):
    """A measurement's result, and what the network computed meanwhile."""
    recorder = Recorder(net, names)
    with recorder.running():
        return measure(), recorder


def exact_cka(xs, ys):
    """Of activations whose means, which change nothing, may be far above their deviations."""
    about = [
        [torch.cat([one[part] - one[part].mean(0) for part in PARTS]) for one in side]
        for side in (xs, ys)
    ]
    return slow_cka(*about, PARTS)(PARTS)


def error_of_mean(each):
    return each.std(0, ddof=1) / math.sqrt(len(each))


@vits
def test_cka_of_vits(kind):
    net = hard_vit(kind)
    names = ["patch_embed", "blocks.0.norm1", "blocks.0", "blocks.1", "norm"]
    result, recorder = seen(
        net, names, lambda: cka.measure(wrap(net), images(), layers=names, **OPTIONS)
    )
    found = [recorder.gave(name) for name in result.layers]
    assert sorted(result.layers) == sorted(names)
    np.testing.assert_allclose(result.cka, exact_cka(found, found), rtol=0, atol=CKA_TOLERANCE)


@cnns
def test_cka_of_cnns(kind):
    net = hard_cnn(kind)
    names = ["bn1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "global_pool"]
    result, recorder = seen(
        net, names, lambda: cka.measure(wrap(net), images(), layers=names, **OPTIONS)
    )
    found = [recorder.gave(name) for name in result.layers]
    assert sorted(result.layers) == sorted(names)
    np.testing.assert_allclose(result.cka, exact_cka(found, found), rtol=0, atol=CKA_TOLERANCE)


def slow_maps(qkv):
    """Maps of (images, heads, queries, keys), and how far each share may be off."""
    query, key, _ = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    width = query.shape[-1]
    maps = (query @ key.mT / math.sqrt(width)).softmax(-1)
    blurred = 8 * U * (query.abs() @ key.abs().mT) + 64 * U
    return maps, maps * blurred


QKV = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


@vits
@pytest.mark.parametrize("renormalise", [False, True])
def test_attention_distance(kind, renormalise):
    net = hard_vit(kind)
    result, recorder = seen(
        net, QKV,
        lambda: attention_distance.measure(wrap(net), images(), renormalise=renormalise, **OPTIONS),
    )  # fmt: skip
    place = [(PATCH * r, PATCH * c) for r in range(GRID) for c in range(GRID)]
    pixels = torch.tensor([[math.dist(a, b) for b in place] for a in place]).double()
    for layer, name in enumerate(QKV):
        maps, off = (part[..., 1:, 1:] for part in slow_maps(recorder.gave(name)))
        mass = maps.sum(-1, keepdim=True) if renormalise else torch.ones(1)
        each = (maps / mass * pixels).sum(-1).mean(-1)
        allowed = 2 * (off / mass).sum(-1).mean((0, 2)) * pixels.max() + 64 * U * each.mean(0)
        assert (abs(result.distance_px[layer] - each.mean(0).numpy()) <= allowed.numpy()).all()
        np.testing.assert_allclose(
            result.distance_se[layer], error_of_mean(each.numpy()),
            rtol=0, atol=float(allowed.max()) * 3 + 2e-7 * float(pixels.max()),
        )  # fmt: skip


@vits
def test_attention_rollout(kind):
    net = hard_vit(kind)
    result, recorder = seen(
        net, QKV, lambda: attention_rollout.measure(wrap(net), images(), num_images=N, **OPTIONS)
    )
    rolled, allowed = torch.eye(1 + GRID**2).double(), torch.zeros(()).double()
    for name in QKV:
        maps, off = slow_maps(recorder.gave(name))
        joint = maps.mean(1) + torch.eye(1 + GRID**2)
        rolled = joint / joint.sum(-1, keepdim=True) @ rolled
        allowed = allowed + off.sum(-1).max() + 64 * U
    expected = rolled[:, 0, 1:].reshape(N, GRID, GRID)
    np.testing.assert_allclose(result.rollout, expected, rtol=0, atol=float(allowed))


@vits
def test_skip_ratio_of_vits(kind):
    net = hard_vit(kind)
    names = [f"blocks.{i}.{part}" for i in range(2) for part in ("norm1", "norm2", "ls1", "ls2")]
    result, recorder = seen(net, names, lambda: skip_ratio.measure(wrap(net), images(), **OPTIONS))
    for row in range(4):
        block, half = divmod(row, 2)
        skip = recorder.took(f"blocks.{block}.norm{half + 1}").numpy()
        branch = recorder.gave(f"blocks.{block}.ls{half + 1}").numpy()
        lengths = [np.linalg.norm(part, axis=-1) for part in (skip, branch)]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = lengths[0] / lengths[1]
            cosine = (skip * branch).sum(-1) / lengths[0] / lengths[1]
        np.testing.assert_allclose(result.ratio[row], ratio.mean(0), rtol=2 * NORM_TOLERANCE)
        np.testing.assert_allclose(result.cosine[row], cosine.mean(0), atol=3 * NORM_TOLERANCE)


@vits
def test_localization(kind):
    net = hard_vit(kind)
    result, recorder = seen(
        net, ["blocks.1"], lambda: localization.measure(wrap(net), images(), **OPTIONS)
    )
    order = np.random.default_rng(0).permutation(N)
    shape = (N, 3, GRID, PATCH, GRID, PATCH)
    # A half-precision network sees half-precision pixels.
    dtype = next(net.parameters()).dtype
    pixels = images()[order].to(dtype).double().reshape(shape).permute(0, 2, 4, 1, 3, 5)
    patches = pixels.reshape(N, GRID**2, -1).unbind(1)
    tokens = recorder.gave("blocks.1")[:, 1:].unbind(1)
    expected = exact_cka(tokens, patches).reshape(result.cka.shape)
    np.testing.assert_allclose(result.cka, expected, rtol=0, atol=CKA_TOLERANCE)


@vits
def test_skip_ablation(kind):
    net = hard_vit(kind)
    names = ["blocks.0", "blocks.1"]
    result, recorder = seen(
        net, names,
        lambda: skip_ablation.measure(wrap(net), images(), layers=names, blocks=[1], **OPTIONS),
    )  # fmt: skip
    # Each batch passes as it is, and then without the skips of block 1.
    for first, row in ((0, 0), (1, 1)):
        found = [torch.cat(recorder.outputs[name][first::2]) for name in names]
        expected = exact_cka(found, found)
        np.testing.assert_allclose(result.cka[row], expected, rtol=0, atol=CKA_TOLERANCE)


@vits
def test_head_subsets(kind):
    net, cnn = hard_vit(kind), hard_cnn("as drawn")
    recorder, low = Recorder(net, ["blocks.0.attn.qkv"]), Recorder(cnn, ["layer1.0"])
    with recorder.running(), low.running():
        result = head_subsets.measure([wrap(net), wrap(cnn, "cnn")], images(), **OPTIONS)
    qkv = recorder.gave("blocks.0.attn.qkv")
    value = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)[2]
    maps, off = slow_maps(qkv)
    heads = (maps @ value).unbind(1)
    expected = exact_cka([low.gave("layer1.0")], [heads[int(h)] for (h,) in result.heads])[0]
    # Heads put out what the network's own type holds.
    stored = torch.finfo(next(net.parameters()).dtype).eps
    allowed = CKA_TOLERANCE + 4 * float(off.sum(-1).max()) + 4 * stored
    np.testing.assert_allclose(result.cka[0], expected, rtol=0, atol=allowed)


@vits
def test_receptive_field(kind):
    net = hard_vit(kind)
    result = receptive_field.measure(
        wrap(net), images(), num_images=4, batch_size=2, channels="all", layers="blocks.1",
        quiet=True,
    )  # fmt: skip
    dtype = next(net.parameters()).dtype
    order = np.random.default_rng(0).permutation(N)[:4]
    pixels = images()[order].to(dtype).double().requires_grad_()
    wide = copy.deepcopy(net).double()
    kept = []
    wide.blocks[1].register_forward_hook(lambda m, given, out: kept.append(out))
    wide(pixels)
    centre = kept[0][:, 1 + GRID // 2 * GRID + GRID // 2]
    rows = [
        torch.autograd.grad(centre[:, k].sum(), pixels, retain_graph=True)[0].abs()
        for k in range(WIDTH)
    ]
    expected = torch.stack(rows).mean((0, 1, 2)).numpy()
    found = np.asarray(result.gradient[0])
    # Four sublayers of products of d, there and back; a bias of 300 takes that many digits from
    # what it is added to, and half types round what each of a sublayer's four operations stores.
    allowed = 4 * NORM_TOLERANCE * (300 if "biases" in kind else 1)
    # Scores of 300 are off by 8 U of that, and shares by as much of theirs.
    if kind == "logits of 300":
        allowed += 8 * U * 300
    if dtype != torch.float32:
        allowed = 4 * 4 * torch.finfo(dtype).eps / 2
    assert abs(found - expected).max() <= allowed * expected.max()


@vits
def test_linear_probe(kind):
    net = hard_vit(kind)
    labels = np.arange(60) % 3
    pixels = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    pixels[:, 0] += 0.3 * torch.from_numpy(labels - 1)[:, None, None]
    source = Images(
        "made", TensorSource(pixels), np.arange(60), "", labels=labels, classes=("a", "b", "c")
    )
    fit, test = (source.choose(np.arange(*ends)) for ends in ((0, 24), (24, 60)))
    result = linear_probe.measure(
        wrap(net), fit, test_images=test, layers="blocks.1", shots=4, draws=1, **OPTIONS
    )
    with torch.no_grad():
        dtype = next(net.parameters()).dtype
        kept = []
        handle = net.blocks[1].register_forward_hook(lambda m, a, out: kept.append(out.double()))
        for batch in pixels.to(dtype).split(BATCH):
            net(batch)
        handle.remove()
    tokens = torch.cat(kept).numpy()
    rows = np.concatenate([np.flatnonzero(labels[:24] == c)[:4] for c in range(3)])
    readouts = [str(name) for name in result.readouts]
    for name, features in (("CLS", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        found = result.accuracy_of_draw[0, 0, readouts.index(name)]
        # A few roundings are nothing to tell classes by.
        if (features.std(0) > 100 * U * abs(features.mean(0))).any():
            assert found == slow_probe(features, rows, labels)


@cnns
def test_patch_embedding_of_cnns(kind):
    net = hard_cnn(kind)
    result = patch_embedding.measure(wrap(net))
    filters = net.conv1[0].weight.detach().double().flatten(1).numpy()
    spread = np.linalg.svd(filters - filters.mean(0), compute_uv=False) ** 2
    shares = spread / spread.sum()
    shown = result.explained_variance_ratio
    count = int(np.isfinite(shown).sum())
    assert count == min(len(shares) - 1, 28)
    np.testing.assert_allclose(shown[:count], shares[:count], rtol=0, atol=64 * U)


@vits
def test_position_embedding(kind):
    net = hard_vit(kind)
    result = position_embedding.measure(wrap(net), image_size=GRID * PATCH)
    table = net.pos_embed.detach().double()[0, 1:].numpy()
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    shown = np.asarray(result.similarity).reshape(GRID**2, GRID**2)
    np.testing.assert_allclose(shown, unit @ unit.T, atol=NORM_TOLERANCE)


@vits
def test_token_norms(kind):
    net = hard_vit(kind)
    names = ["blocks.0", "blocks.1"]
    result, recorder = seen(net, names, lambda: token_norms.measure(wrap(net), images(), **OPTIONS))
    assert [str(name) for name in result.layers] == names
    for layer, name in enumerate(names):
        lengths = np.linalg.norm(recorder.gave(name).numpy(), axis=-1)
        np.testing.assert_allclose(
            result.norm_max[layer], lengths[:, 1:].max(), rtol=NORM_TOLERANCE
        )
        np.testing.assert_allclose(
            result.prefix_norm[layer], lengths[:, :1].mean(0), rtol=NORM_TOLERANCE
        )


def test_measurements_are_not_rounded_like_the_passes():
    """Under autocast products are bfloat16: those of the network, not those made of it."""
    net = hard_vit("as drawn")
    halves = {**OPTIONS, "precision": "bf16"}
    names = [f"blocks.{i}.{part}" for i in range(2) for part in ("norm1", "norm2", "ls1", "ls2")]
    result, recorder = seen(net, names, lambda: skip_ratio.measure(wrap(net), images(), **halves))
    for row in range(4):
        block, half = divmod(row, 2)
        skip = recorder.took(f"blocks.{block}.norm{half + 1}").numpy()
        branch = recorder.gave(f"blocks.{block}.ls{half + 1}").numpy()
        ratio = np.linalg.norm(skip, axis=-1) / np.linalg.norm(branch, axis=-1)
        np.testing.assert_allclose(result.ratio[row], ratio.mean(0), rtol=2 * NORM_TOLERANCE)
    names = ["blocks.0", "blocks.1"]
    result, recorder = seen(net, names, lambda: token_norms.measure(wrap(net), images(), **halves))
    for layer, name in enumerate(names):
        lengths = np.linalg.norm(recorder.gave(name).numpy(), axis=-1)
        np.testing.assert_allclose(
            result.norm_max[layer], lengths[:, 1:].max(), rtol=NORM_TOLERANCE
        )
    result, recorder = seen(
        net, names, lambda: localization.measure(wrap(net), images(), layers="blocks", **halves)
    )
    found = [recorder.gave(name)[:, 1:].unbind(1) for name in names]
    order = np.random.default_rng(0).permutation(N)
    shape = (N, 3, GRID, PATCH, GRID, PATCH)
    pixels = images()[order].double().reshape(shape).permute(0, 2, 4, 1, 3, 5)
    patches = pixels.reshape(N, GRID**2, -1).unbind(1)
    expected = np.concatenate([exact_cka(tokens, patches).ravel() for tokens in found])
    np.testing.assert_allclose(result.cka.ravel(), expected, rtol=0, atol=CKA_TOLERANCE)
