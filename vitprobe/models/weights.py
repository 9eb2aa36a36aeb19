"""Weights from files and from the model hub, read without executing anything in them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vitprobe.errors import VitprobeError, nearest

HUB_PATIENCE_S = 3.0


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch checkpoint, without executing anything in it."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VitprobeError(
            f"--models: no such weights file: {str(path)!r}.{nearest(path.name, siblings)}"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Readers of damaged files raise anything; whatever it is, the file is the reason.
        raise VitprobeError(
            f"{path} is neither a safetensors file nor a state dict that can be read safely "
            f"({type(error).__name__})."
        ) from error
    from timm.models import clean_state_dict

    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise VitprobeError(f"{path} holds no state dict.")
    return clean_state_dict({k: v for k, v in loaded.items() if isinstance(v, Tensor)})


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def hub() -> Iterator[None]:
    """Within it, a hub that does not answer fails at once; a cached file is used all the same.

    The hub's client retries for most of a minute. A quick look decides whether to let it try: if
    nobody answers, it is told that it is offline, which makes it look into its cache only.
    """
    from huggingface_hub import constants

    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    offline = constants.HF_HUB_OFFLINE
    hub_log.setLevel(logging.ERROR)
    try:
        if not offline and not _hub_answers(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        hub_log.setLevel(level)


@cache
def _hub_answers(endpoint: str) -> bool:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        # urllib honours the usual proxy settings, as the hub's client does.
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_PATIENCE_S):
            return True
    except HTTPError:
        return True
    except (URLError, OSError, ValueError):
        return False


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch's report of a misfit begins with a heading and then names the keys.
    text = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
    return text if len(text) <= 200 else f"{text[:200]}..."
