"""A network with what a measurement must know about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import shown


def _plain(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is sharded, sparse or quantised, as numbers side by side."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


@dataclass(frozen=True)
class Model:
    """A network with what a measurement must know about it.

    Attributes:
        name: what figures call it.
        module: the network.
        transform: PIL image -> tensor (C, H, W) as the network wants it; None where only tensors
            can be given.
        input_size: (C, H, W) of that tensor; None where unknown.
        origin: where the weights come from, in words.
        timm_name: timm's name, empty for other modules.
        transform_key: equal for two models whose transforms do the same; empty where nothing is
            known of what it does.
        details: what else provenance should hold (file, its sha256, the model card).
    """

    name: str
    module: nn.Module
    transform: Callable[[Any], Tensor] | None = None
    input_size: tuple[int, int, int] | None = None
    origin: str = "given module"
    timm_name: str = ""
    transform_key: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Both come from outside, and go into figures, files and onto terminals.
        for name in ("name", "origin"):
            object.__setattr__(self, name, shown(getattr(self, name)))

    def __call__(self, images: Tensor) -> Any:
        """A forward pass of the network on (n, C, H, W) as it takes them."""
        return self.module(images)

    @property
    def untrained(self) -> bool:
        return self.origin.startswith("random")

    def weights_sha256(self) -> str:
        """sha256 over the names, types, shapes and bytes of the state dict."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if not isinstance(tensor, Tensor):
                # What a module keeps beside its tensors (get_extra_state).
                digest.update(f"{name} {tensor!r}".encode(errors="surrogatepass"))
                continue
            tensor = _plain(tensor.detach()).cpu().contiguous()
            about = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            digest.update(about.encode(errors="surrogatepass"))
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What a result file says about this model; plain JSON values."""
        return {
            "name": self.name,
            "timm_name": self.timm_name,
            "weights": self.origin,
            "weights_sha256": self.weights_sha256(),
            "input_size": list(self.input_size) if self.input_size else None,
            "transform": self.transform_key or ("given" if self.transform else ""),
            **self.details,
        }
