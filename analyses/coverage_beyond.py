"""Networks of other libraries, small, and one network in the ways that people have it.

``coverage.py --beyond`` measures them: one that is wrapped, compiled or adapted, or somebody
else's, each with random weights. Libraries that are not installed are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from vitprobe.models.loading import wrap

SIDE, CLASSES = 64, 5


class Theirs(NamedTuple):
    """A network of somebody else's, or in a shape of its own.

    Attributes:
        library: that it takes, to be imported.
        build: gives it, as a module or a model.
        side: of its images.
    """

    library: str
    build: Callable[[], Any]
    side: int = SIDE

    @property
    def is_there(self) -> bool:
        return find_spec(self.library) is not None


def of(module: str, name: str, *args: Any, **options: Any) -> Any:
    """What a class or function of a module gives."""
    return getattr(import_module(module), name)(*args, **options)


def test_vit() -> nn.Module:
    return timm.create_model("test_vit", img_size=SIDE).eval()


TORCHVISION = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_x_400mf",
    "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1",
)  # fmt: skip


def torchvision_swin(second: bool) -> nn.Module:
    swin = import_module("torchvision.models.swin_transformer")
    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    of_the_second = parts if second else {}
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], **of_the_second)


def torchvision_convnext() -> nn.Module:
    convnext = import_module("torchvision.models.convnext")
    widths = ((8, 16, 1), (16, 32, 1), (32, 64, 3), (64, None, 1))
    settings = [convnext.CNBlockConfig(*one) for one in widths]
    return convnext.ConvNeXt(settings, num_classes=CLASSES)


def flattened(name: str) -> nn.Module:
    return torch.fx.symbolic_trace(of("torchvision.models", name).eval())


def from_torchvision() -> dict[str, Theirs]:
    models = "torchvision.models"
    build = {name: partial(of, models, name) for name in TORCHVISION}
    build["densenet"] = partial(of, models, "DenseNet", 8, (2, 2, 3), 16, num_classes=CLASSES)
    build["convnext"] = torchvision_convnext
    build["vision_transformer"] = partial(
        of, models, "VisionTransformer", SIDE, 16, 3, 2, 32, 64
    )  # fmt: skip
    build["swin_transformer"] = partial(torchvision_swin, False)
    build["swin_transformer_v2"] = partial(torchvision_swin, True)
    build["maxvit"] = partial(of, models, "MaxVit", (SIDE, SIDE), 8, 4, [8, 16], [1, 2], 4, 0.0)
    build["resnet18, flattened by torch.fx"] = partial(flattened, "resnet18")
    build["mobilenet_v2, flattened by torch.fx"] = partial(flattened, "mobilenet_v2")
    return {name: Theirs("torchvision", one) for name, one in build.items()}


PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": SIDE, "patch_size": 16,
}  # fmt: skip
WINDOWS = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": SIDE,
    "patch_size": 4,
}  # fmt: skip
MAPS = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 3, 1]}
# What transformers calls a network, whether it classifies, and its configuration.
TRANSFORMERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "ViT": (True, PLAIN),
    "DeiT": (True, PLAIN),
    "Dinov2": (True, PLAIN),
    "Dinov2WithRegisters": (True, PLAIN),
    "DINOv3ViT": (False, PLAIN),
    "Beit": (True, PLAIN | {"use_relative_position_bias": True}),
    "Data2VecVision": (True, PLAIN | {"use_relative_position_bias": True}),
    "ViTMSN": (True, PLAIN),
    "ViTMAE": (False, PLAIN),
    "IJepa": (True, PLAIN),
    "CLIPVision": (False, PLAIN),
    "SiglipVision": (False, PLAIN),
    "Swin": (True, WINDOWS),
    "Swinv2": (True, WINDOWS),
    "ConvNext": (True, MAPS),
    "ConvNextV2": (True, MAPS),
    "ResNet": (True, MAPS | {"embedding_size": 8}),
    "MobileNetV2": (True, {}),
    "EfficientNet": (True, {}),
    "MobileViT": (True, {"image_size": SIDE}),
    "Segformer": (True, {}),
    "PvtV2": (True, {"image_size": SIDE}),
    "Hiera": (True, {"image_size": [SIDE, SIDE], "embed_dim": 24}),
    "FocalNet": (True, {"image_size": SIDE, "embed_dim": 24}),
    "Cvt": (True, {}),
    "Levit": (True, {"image_size": SIDE}),
    "PoolFormer": (True, {}),
}


def transformers_model(name: str) -> nn.Module:
    classifies, options = TRANSFORMERS[name]
    config = of("transformers", f"{name}Config", **options)
    suffix = "ForImageClassification" if classifies else "Model"
    return of("transformers", f"{name}{suffix}", config)


VIT_PYTORCH: dict[str, Any] = {
    "image_size": SIDE, "patch_size": 16, "num_classes": CLASSES, "dim": 32, "depth": 3,
    "heads": 2, "mlp_dim": 64,
}  # fmt: skip


def from_vit_pytorch() -> dict[str, Theirs]:
    plain = {
        "ViT": "vit", "SimpleViT": "simple_vit", "DeepViT": "deepvit", "parallel ViT":
        "parallel_vit", "RegisterViT": "simple_vit_with_register_tokens", "RoPE ViT": "rvt",
        "learnable memory": "learnable_memory_vit", "PatchDropout": "vit_with_patch_dropout",
    }  # fmt: skip
    classes = {"SimpleViT": "SimpleViT", "DeepViT": "DeepViT", "RegisterViT": "SimpleViT",
               "RoPE ViT": "RvT"}  # fmt: skip
    found = {
        name: Theirs("vit_pytorch", partial(of, f"vit_pytorch.{module}", classes.get(name, "ViT"),
                                            **VIT_PYTORCH))
        for name, module in plain.items()
    }  # fmt: skip
    cait = VIT_PYTORCH | {"cls_depth": 2}
    return found | {"CaiT": Theirs("vit_pytorch", partial(of, "vit_pytorch.cait", "CaiT", **cait))}


def clip(part: str = "visual", half: bool = False) -> Any:
    """The image tower of a CLIP, or the whole of it, called with images."""
    library = import_module("open_clip.model")
    vision = {"image_size": SIDE, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32}
    if part == "ResNet":
        vision = {"image_size": SIDE, "width": 16, "layers": [1, 1, 2, 1]}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    found = library.CLIP(32, vision, text).eval()
    if half:
        library.convert_weights_to_lp(found, torch.float16)
    if part == "whole":
        return wrap(found, forward=lambda module, images: module.encode_image(images))
    return found.visual


def adapted(base: Callable[[], nn.Module], targets: list[str], **options: Any) -> nn.Module:
    peft = import_module("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, **options)
    return peft.get_peft_model(base(), config)


def lightning() -> nn.Module:
    library = import_module("pytorch_lightning")

    class Classifier(library.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = test_vit()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    return Classifier()


def from_monai() -> dict[str, Theirs]:
    nets = "monai.networks.nets"
    return {
        "ViT": Theirs("monai", partial(
            of, nets, "ViT", 3, (SIDE, SIDE), (16, 16), hidden_size=32, mlp_dim=64, num_layers=3,
            num_heads=2, spatial_dims=2, classification=True, num_classes=CLASSES)),
        "DenseNet121": Theirs("monai", partial(of, nets, "DenseNet121", 2, 3, CLASSES)),
        "ResNet": Theirs("monai", partial(
            of, nets, "ResNet", "basic", [1, 1, 1, 1], [8, 16, 32, 64], spatial_dims=2,
            n_input_channels=3, num_classes=CLASSES)),
        "EfficientNetBN": Theirs("monai", partial(
            of, nets, "EfficientNetBN", "efficientnet-b0", pretrained=False)),
        "UNet": Theirs("monai", partial(
            of, nets, "UNet", 2, 3, 2, (8, 16, 32), (2, 2), num_res_units=2)),
        "SwinUNETR": Theirs("monai", partial(
            of, nets, "SwinUNETR", 3, 2, feature_size=12, spatial_dims=2)),
    }  # fmt: skip


def in_shells() -> dict[str, Theirs]:
    """timm's smallest ViT in the ways that people have it."""
    images = torch.zeros(2, 3, SIDE, SIDE)
    build: dict[str, Callable[[], Any]] = {
        "test_vit as it is": test_vit,
        "test_vit, torch.compile": lambda: torch.compile(test_vit()),
        "test_vit, DataParallel": lambda: nn.DataParallel(test_vit()),
        "test_vit, bfloat16": lambda: test_vit().bfloat16(),
        "test_vit, a forward of its own": lambda: wrap(
            test_vit(), forward=lambda module, x: module.forward_features(x)
        ),
        "test_vit, torch.jit.trace": lambda: torch.jit.trace(test_vit(), images),
        "test_vit, torch.export": lambda: torch.export.export(test_vit(), (images,)).module(),
    }
    return {name: Theirs("torch", one) for name, one in build.items()}


def networks() -> dict[tuple[str, str], Theirs]:
    """All of them, by library and name."""
    found = {
        "torch": in_shells(),
        "torchvision": from_torchvision(),
        "transformers": {
            name: Theirs("transformers", partial(transformers_model, name)) for name in TRANSFORMERS
        },
        "open_clip": {
            "CLIP, image tower": Theirs("open_clip", clip),
            "CLIP, image tower in mixed precision": Theirs("open_clip", partial(clip, half=True)),
            "CLIP, encode_image": Theirs("open_clip", partial(clip, "whole")),
            "CLIP, ResNet": Theirs("open_clip", partial(clip, "ResNet")),
        },
        "vit_pytorch": from_vit_pytorch(),
        "peft": {
            "LoRA of test_vit": Theirs("peft", partial(adapted, test_vit, ["qkv", "proj"])),
            "DoRA of test_vit": Theirs(
                "peft", partial(adapted, test_vit, ["qkv", "fc1", "fc2"], use_dora=True)
            ),
        },
        "monai": from_monai(),
        "pytorch_lightning": {"LightningModule": Theirs("pytorch_lightning", lightning)},
    }
    return {(library, name): one for library, those in found.items() for name, one in those.items()}
