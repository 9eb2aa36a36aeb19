"""vitprobe shows how Vision Transformers and convolutional networks differ inside.

The public names load on first use, so that ``python -m vitprobe.cka`` starts one module once and
``import vitprobe`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitprobe._version import __version__

if TYPE_CHECKING:
    from vitprobe.core.errors import VitprobeError
    from vitprobe.core.images import open_images
    from vitprobe.core.models import Model, load_model, wrap
    from vitprobe.core.results import Result, load_result

_HOME = {
    "load_model": "vitprobe.core.models",
    "wrap": "vitprobe.core.models",
    "Model": "vitprobe.core.models",
    "open_images": "vitprobe.core.images",
    "load_result": "vitprobe.core.results",
    "Result": "vitprobe.core.results",
    "VitprobeError": "vitprobe.core.errors",
}

__all__ = [
    "Model",
    "Result",
    "VitprobeError",
    "__version__",
    "load_model",
    "load_result",
    "open_images",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vitprobe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
