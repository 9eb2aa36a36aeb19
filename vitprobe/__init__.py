"""vitprobe shows how Vision Transformers and convolutional networks differ inside.

The public names load on first use, so that ``python -m vitprobe.cka`` starts one module once and
``import vitprobe`` costs nothing.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitprobe._version import __version__

if TYPE_CHECKING:
    from vitprobe.activations import attention_maps, capture
    from vitprobe.errors import VitprobeError
    from vitprobe.extract import extract
    from vitprobe.images.sources import open_images
    from vitprobe.layer_table import layers
    from vitprobe.models.loading import Model, load_model, wrap
    from vitprobe.results.result import Result, load_result
    from vitprobe.together import measure_all

_HOME = {
    "attention_maps": "vitprobe.activations",
    "capture": "vitprobe.activations",
    "extract": "vitprobe.extract",
    "layers": "vitprobe.layer_table",
    "load_model": "vitprobe.models.loading",
    "wrap": "vitprobe.models.loading",
    "Model": "vitprobe.models.loading",
    "open_images": "vitprobe.images.sources",
    "load_result": "vitprobe.results.result",
    "Result": "vitprobe.results.result",
    "measure_all": "vitprobe.together",
    "VitprobeError": "vitprobe.errors",
}

__all__ = [
    "Model",
    "Result",
    "VitprobeError",
    "__version__",
    "attention_maps",
    "capture",
    "extract",
    "layers",
    "load_model",
    "load_result",
    "measure_all",
    "open_images",
    "wrap",
]


if sys.argv[:1] == ["-m"]:
    # ``python -m vitprobe.NAME`` looks its module up, and then loads libraries for seconds.
    from vitprobe.errors import tell_stops_in_a_line

    tell_stops_in_a_line()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vitprobe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
