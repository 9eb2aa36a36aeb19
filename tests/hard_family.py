"""Small networks made as trained ones are: outliers, one-hot attention, dead channels, half types.

Each is drawn from a seed and then spoilt in one way. ``Recorder`` keeps, in float64, what a network
computed while a measurement ran it: references start from the same activations, so that what they
differ by is the arithmetic of the measurement and nothing else.
"""

from __future__ import annotations

from contextlib import contextmanager

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

N, BATCH, GRID, PATCH, HEADS, WIDTH = 18, 6, 4, 8, 4, 32
PARTS = [slice(0, 6), slice(6, 12), slice(12, 18)]


def images():
    return torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def one_hot_rows(net, size=100):
    """Logits reach ±100, and most rows give all their attention to one token."""
    largest = []

    def see(module, _, out):
        query, key, _ = out.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        largest.append(float((query @ key.mT).abs().max()) * (WIDTH / HEADS) ** -0.5)

    for block in net.blocks:
        handle = block.attn.qkv.register_forward_hook(see)
        with torch.no_grad():
            net(images())
            handle.remove()
            block.attn.qkv.weight[: 2 * WIDTH] *= (size / largest.pop()) ** 0.5


def massive_channels(net):
    net.blocks[0].mlp.fc2.bias[[3, 17]] = torch.tensor([1000.0, -1000.0])
    net.blocks[0].mlp.fc2.weight[[3, 17]] *= 1000


def massive_tokens(net):
    net.pos_embed[:, [2, 9]] *= 50


def massive_activation(net):
    """Of 1e4, in one channel of one token, as trained ViTs have them from an early block on."""
    net.pos_embed[:, 4, 3] = 1e4


def small_layer_scale(net, size=1e-5):
    for block in net.blocks:
        block.ls1.gamma.fill_(size)
        block.ls2.gamma.fill_(size)


def dead_and_duplicated_channels(net):
    into_the_stream = [net.patch_embed.proj]
    for block in net.blocks:
        into_the_stream += [block.attn.proj, block.mlp.fc2]
    for layer in into_the_stream:
        for part in (layer.weight, layer.bias):
            part[5] = 0
            part[7] = part[6]
    for table in (net.pos_embed, net.cls_token):
        table[..., 5] = 0
        table[..., 7] = table[..., 6]


def far_biases(net):
    net.patch_embed.proj.bias += 300
    net.blocks[1].mlp.fc2.bias += 1000


def tiny_activations(net):
    for part in (net.patch_embed.proj.weight, net.patch_embed.proj.bias, net.pos_embed):
        part *= 1e-18
    net.cls_token *= 1e-18
    small_layer_scale(net)


VITS = {
    "as drawn": lambda net: None,
    "one-hot rows": one_hot_rows,
    "logits of 300": lambda net: one_hot_rows(net, 300),
    "massive channels": massive_channels,
    "massive tokens": massive_tokens,
    "massive activation": massive_activation,
    "layer scale of 1e-5": small_layer_scale,
    "layer scale of 1e-6": lambda net: small_layer_scale(net, 1e-6),
    "dead and duplicated channels": dead_and_duplicated_channels,
    "biases far above deviations": far_biases,
    "tiny activations": tiny_activations,
    "float16 weights": lambda net: net.half(),
    "bfloat16 weights": lambda net: net.bfloat16(),
}


def hard_vit(kind):
    torch.manual_seed(0)
    net = VisionTransformer(
        img_size=GRID * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=HEADS,
        init_values=1.0, num_classes=3,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.weight *= 40
        torch.nn.init.normal_(net.pos_embed)
        VITS[kind](net)
    return net


def norms(net):
    return [part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d)]


def tiny_variances(net, size=1e-6):
    for norm in norms(net):
        norm.running_var[::7] = size


def far_norm_biases(net):
    for norm in norms(net):
        norm.bias += 1000


def dead_norms(net):
    for norm in norms(net):
        norm.weight[::5] = 0
        norm.bias[::5] = 0


CNNS = {
    "as drawn": lambda net: None,
    "running variances of 1e-6": tiny_variances,
    "running variances of 1e-10": lambda net: tiny_variances(net, 1e-10),
    "biases far above deviations": far_norm_biases,
    "dead channels": dead_norms,
    "float16 weights": lambda net: net.half(),
    "bfloat16 weights": lambda net: net.bfloat16(),
}


def hard_cnn(kind):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", zero_init_last=False).eval()
    with torch.no_grad():
        CNNS[kind](net)
    return net


class Recorder:
    """What modules took in and put out in passes over whole batches, in order, in float64."""

    def __init__(self, net, names, batch=BATCH):
        self.net, self.names, self.batch = net, names, batch
        self.inputs = {name: [] for name in names}
        self.outputs = {name: [] for name in names}

    @contextmanager
    def running(self):
        def keep(name):
            def hook(_, given, out):
                if len(given[0]) == self.batch:
                    self.inputs[name].append(given[0].detach().double())
                    self.outputs[name].append(out.detach().double())

            return hook

        parts = dict(self.net.named_modules())
        handles = [parts[name].register_forward_hook(keep(name)) for name in self.names]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def took(self, name):
        return torch.cat(self.inputs[name])

    def gave(self, name):
        return torch.cat(self.outputs[name])
