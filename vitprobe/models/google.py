"""Google's .npz files of ViT, augreg and BiT, which timm's networks read themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from vitprobe.errors import VitprobeError, ran_out
from vitprobe.models.contents import Contents

# In names of arrays that belong to no layer which timm's networks have, or may differ in size.
HEAD, TABLE, BEFORE_HEAD = "head/", "pos", "pre_logits/"
# Where the network is in files that hold an optimizer or a text tower beside it.
TOWERS = ("opt/target/", "params/img/", "params/")


def load_npz(
    spec: str, contents: Contents, make: Callable[..., nn.Module]
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with the weights of such a file, and what provenance and captions should hold.

    Args:
        spec: as the user wrote it.
        contents: of the file.
        make: makes the network from ``num_classes`` and ``pretrained``.

    Raises:
        VitprobeError: the network does not read such files, or the file is another network's.
    """
    arrays: Mapping[str, np.ndarray] = contents.tree
    for tower in TOWERS:
        if any(name.startswith(tower) for name in arrays):
            arrays = {n: a for n, a in arrays.items() if n.startswith(tower)}
            break
    left_out = [n for n in arrays if BEFORE_HEAD in n]
    if left_out:
        # The classifier takes what that layer puts out, which timm's networks no longer have.
        left_out += [n for n in arrays if HEAD in n]
    heads = [a.shape[-1] for n, a in arrays.items()
             if HEAD in n and n.endswith("bias") and a.ndim and not left_out]  # fmt: skip
    module = make(num_classes=heads[0] if heads else 0, pretrained=False)
    reader: Any = getattr(module, "load_pretrained", None)
    if reader is None:
        raise VitprobeError(f"{spec}: timm reads no .npz for this architecture.")
    _check_patches(spec, arrays, module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    fixed = {name for name, _ in module.named_buffers()} - set(module.state_dict())
    # What is still undefined afterwards did not come from the file.
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in fixed:
                tensor.fill_(math.nan)
    try:
        reader(str(contents.path))
    except Exception as error:
        if ran_out(error):
            raise
        # timm takes the arrays one by one: one that is absent or of another shape raises anything.
        raise VitprobeError(
            f"{spec}: the weights do not fit the architecture: {type(error).__name__}, {error}. "
            f"The file has {', '.join(list(arrays)[:3])} ..."
        ) from error
    unset = [name for name, tensor in weights.items() if tensor.isnan().any()]
    if unset:
        raise VitprobeError(f"{spec}: the file lacks {', '.join(unset[:3])} and what follows.")
    _check_rest(spec, {n: a for n, a in arrays.items() if n not in left_out}, weights)
    said = {"left_out": left_out} if left_out else {}
    return module, {"layout": "Google's .npz", **said, **_resampled(arrays, weights)}


def _check_patches(spec: str, arrays: Mapping[str, np.ndarray], module: nn.Module) -> None:
    kernel = next((a for n, a in arrays.items() if n.endswith("embedding/kernel")), None)
    proj: Any = getattr(getattr(module, "patch_embed", None), "proj", None)
    if kernel is None or kernel.ndim != 4 or proj is None:
        return
    has, needs = tuple(kernel.shape[:2]), tuple(proj.weight.shape[-2:])
    if has != needs:
        raise VitprobeError(
            f"{spec}: the file's patches (embedding/kernel) are {has[0]}×{has[1]} pixels, the "
            f"network's {needs[0]}×{needs[1]}: it is another network."
        )


def _check_rest(
    spec: str, arrays: Mapping[str, np.ndarray], weights: Mapping[str, torch.Tensor]
) -> None:
    """timm takes what it looks for: a deeper network's further blocks would go unnoticed."""
    has = sum(a.size for n, a in arrays.items() if TABLE not in n)
    used = sum(t.numel() for n, t in weights.items() if TABLE not in n)
    if has > used:
        raise VitprobeError(
            f"{spec}: the file holds another network: {has:,} weights beside its position table, "
            f"of which this one takes {used:,}."
        )


def _resampled(
    arrays: Mapping[str, np.ndarray], weights: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    table = next((a for n, a in arrays.items() if n.endswith("pos_embedding")), None)
    if table is None or "pos_embed" not in weights:
        return {}
    before, after = table.shape[-2], weights["pos_embed"].shape[-2]
    if before == after:
        return {}
    return {"resampled": {"pos_embed": f"from {before} to {after} tokens"}}
