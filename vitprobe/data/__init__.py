"""What vitprobe brings along: labelled digit scenes and small networks trained on them.

Each network is two files, ``NAME.json``, its model card, and ``NAME.safetensors``, its float16
weights.  ``timm.create_model(card["timm_model"], **card["timm_kwargs"])`` makes the network, up to
two departures that no timm argument can express and that the card names when they apply:

- ``"small_stem": true``: the ResNet's stem keeps the full resolution (see ``small_stem``);
- ``"no_skip_block": i``: block i was trained without its skips (see ``without_skips``).

``"position_init_std"`` says how widely the position table was spread before training, which
matters to the untrained twin alone.

``build(card)`` does all of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["build", "load_card", "names", "small_stem", "weights_path", "without_skips"]

_HERE = Path(__file__).parent


def names() -> list[str]:
    """The networks that are shipped, in alphabetical order."""
    return sorted(path.stem for path in _HERE.glob("*.json") if weights_path(path.stem).is_file())


def weights_path(name: str) -> Path:
    """Where the weights of a shipped network lie."""
    return _HERE / f"{name}.safetensors"


def load_card(name: str) -> dict[str, Any]:
    """The model card of a shipped network; KeyError when there is none of this name."""
    path = _HERE / f"{name}.json"
    if not path.is_file():
        raise KeyError(f"no bundled model {name!r}: expected one of {', '.join(names())}")
    return json.loads(path.read_text(encoding="utf-8"))


def build(card: dict[str, Any], *, trained: bool = True) -> nn.Module:
    """The network that a card describes, float32, in evaluation mode.

    trained: with the shipped weights; otherwise freshly initialised from torch's generator.
    Raises ValueError when the weights are not the ones that the card was written for.
    """
    import timm
    from safetensors.torch import load

    module: Any = timm.create_model(card["timm_model"], **card["timm_kwargs"])
    if card.get("small_stem"):
        small_stem(module)
    if card.get("no_skip_block") is not None:
        without_skips(module, card["no_skip_block"])
    if "position_init_std" in card:
        nn.init.normal_(module.pos_embed, std=card["position_init_std"])
    if trained:
        content = (_HERE / card["weights"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != card["sha256"]:
            raise ValueError(f"{card['weights']} does not have the sha256 of its model card")
        module.load_state_dict(load(content))  # copies the float16 values into float32
    return module.eval()


def small_stem(module: Any) -> nn.Module:
    """Let the deep stem (three 3x3 convolutions) of a timm ResNet keep its input's resolution.

    Changes ``module`` in place and returns it: stride 1 in the first convolution, no max-pooling.
    For images of 32 pixels, of which the usual stem would leave an 8x8 map.
    """
    module.conv1[0].stride = (1, 1)
    module.maxpool = nn.Identity()
    return module


def without_skips(module: Any, block: int) -> nn.Module:
    """Take both skip connections out of one block of a timm Vision Transformer.

    Changes ``module`` in place and returns it: block ``block`` (0 is the first) then computes
    MLP(attention(x)), each behind its normalisation, and adds nothing.  It is how a network trained
    without these skips is described, not an ablation of a trained one.
    """
    if not 0 <= block < len(module.blocks):
        raise ValueError(f"no block {block}: expected 0 to {len(module.blocks) - 1}")
    from vitprobe.data.skipless import SkiplessBlock, check_plain

    check_plain(module.blocks[block])
    # Another class on the same instance: parameter names and deep copies stay as they were.
    module.blocks[block].__class__ = SkiplessBlock
    return module
