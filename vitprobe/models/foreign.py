"""transformers' names into timm's, where renaming and joining is all that it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# In front of the encoder's names in models with a head or a text tower.
ROOT = (
    r"^(?:(?:vit|deit|dinov2|dinov2_with_registers|beit|convnext|convnextv2|swin|vision_model)\.)?"
)
# Version 5 calls some parts otherwise in memory than in the files that it saves.
BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
VIT = (
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.mask_token$", "mask_token"),
    (r"embeddings\.register_tokens$", "register_tokens"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (BLOCK + r"attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (BLOCK + r"attention\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
    (BLOCK + r"attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (BLOCK + r"(?:attention\.attention\.)?relative_position_bias\.relative_position_bias_table$",
     r"blocks.\1.attn.relative_position_bias_table"),
    (BLOCK + r"lambda_([12])$", r"blocks.\1.gamma_\2"),
    (BLOCK + r"intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (BLOCK + r"output\.dense\.", r"blocks.\1.mlp.fc2."),
    (BLOCK + r"mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    (BLOCK + r"mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    (BLOCK + r"layernorm_before\.", r"blocks.\1.norm1."),
    (BLOCK + r"layernorm_after\.", r"blocks.\1.norm2."),
    (BLOCK + r"layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (BLOCK + r"(norm1|norm2|mlp\.fc1|mlp\.fc2)\.", r"blocks.\1.\2."),
    (r"layernorm\.", "norm."),
)  # fmt: skip
# BEiT normalises what it has pooled.
BEIT = (*VIT, (r"pooler\.layernorm\.", "fc_norm."))
CLIP = (
    (r"embeddings\.class_embedding$", "cls_token"),
    (r"embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"pre_layrnorm\.", "norm_pre."),
    (BLOCK + r"self_attn\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
    (BLOCK + r"self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (BLOCK + r"layer_norm([12])\.", r"blocks.\1.norm\2."),
    (BLOCK + r"mlp\.", r"blocks.\1.mlp."),
    (r"post_layernorm\.", "norm."),
    (r"head\.probe$", "attn_pool.latent"),
    (r"head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
SWIN_BLOCK = r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
SWIN = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (SWIN_BLOCK + r"attention\.self\.(query|key|value)\.", r"layers.\1.blocks.\2.attn.\3."),
    (SWIN_BLOCK + r"attention\.self\.relative_position_bias_table$",
     r"layers.\1.blocks.\2.attn.relative_position_bias_table"),
    (SWIN_BLOCK + r"attention\.output\.dense\.", r"layers.\1.blocks.\2.attn.proj."),
    (SWIN_BLOCK + r"intermediate\.dense\.", r"layers.\1.blocks.\2.mlp.fc1."),
    (SWIN_BLOCK + r"output\.dense\.", r"layers.\1.blocks.\2.mlp.fc2."),
    (SWIN_BLOCK + r"layernorm_before\.", r"layers.\1.blocks.\2.norm1."),
    (SWIN_BLOCK + r"layernorm_after\.", r"layers.\1.blocks.\2.norm2."),
    (r"encoder\.layers\.(\d+)\.downsample\.", r"layers.\1.downsample."),
    (r"layernorm\.", "norm."),
)  # fmt: skip
STAGE = r"encoder\.stages\.(\d+)\."
CONVNEXT = (
    (r"embeddings\.patch_embeddings\.", "stem.0."),
    (r"embeddings\.layernorm\.", "stem.1."),
    (STAGE + r"downsampling_layer\.(\d)\.", r"stages.\1.downsample.\2."),
    (STAGE + r"layers\.(\d+)\.layer_scale_parameter$", r"stages.\1.blocks.\2.gamma"),
    (STAGE + r"layers\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (STAGE + r"layers\.(\d+)\.layernorm\.", r"stages.\1.blocks.\2.norm."),
    (STAGE + r"layers\.(\d+)\.pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (STAGE + r"layers\.(\d+)\.grn\.", r"stages.\1.blocks.\2.mlp.grn."),
    (r"layernorm\.", "head.norm."),
)
# Blocks in groups, as they are trained; each has its own number all the same.
CHUNKS = ((r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),)
# A key that only one layout has, the layout's name, its renames, its classifiers.
LAYOUTS: tuple[tuple[str, str, tuple[tuple[str, str], ...], dict[str, str]], ...] = (
    (r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.", "transformers (Swin)", SWIN,
     {"classifier.": "head.fc."}),
    (r"encoder\.layers\.\d+\.self_attn\.q_proj\.", "transformers (CLIP, SigLIP)", CLIP, {}),
    (r"encoder\.stages\.\d+\.layers\.\d+\.pwconv1\.", "transformers (ConvNeXt)", CONVNEXT,
     {"classifier.": "head.fc."}),
    (r"embeddings\.register_tokens$|encoder\.layer\.\d+\.layer_scale1\.", "transformers (DINOv2)",
     VIT, {}),
    (BLOCK + r"lambda_1$", "transformers (BEiT)", BEIT, {"classifier.": "head."}),
    (BLOCK + r"attention\.(attention\.query|q_proj)\.", "transformers (ViT)", VIT,
     {"classifier.": "head.", "cls_classifier.": "head.",
      "distillation_classifier.": "head_dist."}),
    (r"blocks\.\d+\.\d+\.", "DINOv2's training code", CHUNKS, {}),
)  # fmt: skip
# Keys by which other libraries' files are known, for the line that says how to go on.
OTHERS = (
    (r"transformer\.resblocks\.\d+\.", "a file of OpenAI's CLIP or open_clip"),
    (r"^transformer\.layers\.\d+\.0\.", "a file of vit-pytorch"),
    (r"(embeddings|encoder)\.(layer|layers|stages)\.\d+\.", "a file of transformers"),
    (r"encoder\.layers\.encoder_layer_\d+\.", "a file of torchvision"),
)


def written_by(state: Mapping[str, Tensor]) -> str:
    """Whose layout a state dict has, in words; empty where it is none that is known."""
    for key, name, _, _ in LAYOUTS:
        if any(re.search(ROOT + key, one) for one in state):
            return name
    for key, name in OTHERS:
        if any(re.search(key, one) for one in state):
            return name
    return ""


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A state dict of transformers by timm's names; None for other layouts.

    What has no counterpart keeps its name.
    """
    for key, _, renames, heads in LAYOUTS:
        if any(re.search(ROOT + key, one) for one in state):
            named = {_named(one, renames, heads): tensor for one, tensor in state.items()}
            return _shaped(_shifted(named) if renames is SWIN else _joined(named))
    return None


def _named(key: str, renames: tuple[tuple[str, str], ...], heads: Mapping[str, str]) -> str:
    for start, head in heads.items():
        if key.startswith(start):
            return head + key[len(start) :]
    for pattern, name in renames:
        if re.search(ROOT + pattern, key):
            return re.sub(ROOT + pattern, name, key)
    return key


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one tensor; of a pooling's query apart."""
    found = dict(state)
    for key in state:
        for first, names in (("query", ("query", "key", "value")), ("q", ("q", "k", "v"))):
            start, middle, end = key.partition(f".attn.{first}.")
            parts = [f"{start}.attn.{name}.{end}" for name in names]
            if middle and all(part in found for part in parts):
                found[f"{start}.attn.qkv.{end}"] = torch.cat([found.pop(p) for p in parts])
            elif middle and end == "bias":
                # BEiT's keys have none.
                for part, name in ((parts[0], "q_bias"), (parts[2], "v_bias")):
                    if part in found:
                        found[f"{start}.attn.{name}"] = found.pop(part)
        if key.startswith("attn_pool.in_proj."):
            end, tensor = key.rpartition(".")[2], found.pop(key)
            width = len(tensor) // 3
            found[f"attn_pool.q.{end}"], found[f"attn_pool.kv.{end}"] = tensor.split(
                [width, 2 * width]
            )
    return found


def _shifted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Swin's merging of patches belongs to the stage after it in timm."""
    found = {}
    for key, tensor in _joined(state).items():
        stage = re.match(r"layers\.(\d+)\.downsample\.", key)
        name = key
        if stage:
            name = f"layers.{int(stage[1]) + 1}.downsample.{key[stage.end() :]}"
        found[name] = tensor
    return found


def _shaped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens and tables with the axes that timm's have."""
    for name in ("cls_token", "pos_embed"):
        if name in state:
            state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    return {n: t.flatten() if ".mlp.grn." in n else t for n, t in state.items()}
