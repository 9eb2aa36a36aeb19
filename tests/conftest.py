"""What the tests share: small images, small models, and no network."""

from __future__ import annotations

import os
import signal

# One thread here and in all processes begun from here: float32's last digits then are the same in
# all of them, whatever the machine, and small networks are no slower.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

# A shell that runs the suite in the background has Ctrl-C ignored, here and in all processes begun
# from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve random 48-pixel PNGs in two class folders."""
    generator = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "pictures" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def tensors():
    """Twenty random images as a float tensor (20, 3, 32, 32)."""
    return torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The folder of an empty cache of the hub."""
    from huggingface_hub import constants, file_download

    folder = tmp_path / "hub"
    # The oldest clients keep its name where they look into it.
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(folder), raising=False)
    return folder


@pytest.fixture(autouse=True)
def foreground():
    """Signals as a terminal's foreground job has them, also after a test that changed them.

    Shells make background jobs ignore Ctrl-C; scripts that run here may set handlers of their own.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
               if hasattr(signal, name)]  # fmt: skip
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def same_arithmetic():
    """No test may leave the process with other arithmetic or fewer threads than it found."""
    threads, smallest_normal = torch.get_num_threads(), np.finfo(np.float64).tiny
    yield
    assert smallest_normal / 2 > 0, "denormal numbers are flushed to zero from here on"
    assert torch.get_num_threads() == threads
