"""What a user's own forward pass raises, told as that: where, of what type, in which words."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

from vitprobe.errors import VitprobeError, describe, is_error

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# In these frames of vitprobe's it is the model that runs: what watches passes hands operations on.
_PASSES_ON = {"__torch_function__", "__torch_dispatch__"}
_OWN_MODELS = tuple(os.path.join(_PACKAGE, name) for name in ("models", "data"))


def forward_failure(
    error: BaseException, models: Sequence[tuple[str, nn.Module]]
) -> VitprobeError | None:
    """One line on an exception that a model's own forward pass has raised.

    Args:
        error: with its traceback.
        models: names and modules, one of which may have raised it.

    Returns:
        None where it was not raised by one of them: it is told by whoever knows better.
    """
    roots = {id(module): (name, module) for name, module in models}
    root: tuple[str, nn.Module] | None = None
    given: Any = None
    innermost: nn.Module | None = None
    frame: FrameType | None = None
    step = error.__traceback__
    while step is not None:
        before, frame = frame, step.tb_frame
        if root is not None and frame.f_back is not before:
            break  # what follows is of an earlier time that this very exception was raised
        part = _module_called(frame)
        if part is not None and (root is not None or id(part) in roots):
            if root is None:
                root, given = roots[id(part)], frame.f_locals.get("args")
            innermost = part
        elif root is not None and _is_ours(frame):
            return None
        step = step.tb_next
    if root is None or isinstance(error, VitprobeError) or not is_error(error):
        return None
    name, module = root
    message = f"{name} cannot run on {_images(given)}: {describe(error)}"
    place = next((path for path, one in module.named_modules() if one is innermost), "")
    if place:
        message += f" (in {place}, {type(innermost).__name__})"
    return VitprobeError(message + _way(error, module))


def _module_called(frame: FrameType) -> nn.Module | None:
    if frame.f_code.co_name not in ("_wrapped_call_impl", "_call_impl", "__call__", "forward"):
        return None
    called = frame.f_locals.get("self")
    return called if isinstance(called, nn.Module) else None


def _file(frame: FrameType) -> str:
    return os.path.abspath(frame.f_code.co_filename)


def _is_ours(frame: FrameType) -> bool:
    file = _file(frame)
    return (
        file.startswith(_PACKAGE)
        and not file.startswith(_OWN_MODELS)
        and frame.f_code.co_name not in _PASSES_ON
    )


def _images(given: Any) -> str:
    """The inputs of the pass, in words."""
    first = given[0] if isinstance(given, tuple) and given else None
    if not isinstance(first, Tensor):
        return "images"
    return f"images of {tuple(first.shape[1:])}"


def _way(error: BaseException, module: nn.Module) -> str:
    """How to call a module that takes something else than images alone, where that may be it."""
    own = getattr(module, "_module", module)
    parameters = inspect.signature(own.forward).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    more = len(named) > 1 and ("specify" in str(error) or isinstance(error, AttributeError))
    if not more and not isinstance(error, TypeError | KeyError | IndexError):
        return ""
    takes = f"; it takes {', '.join(named)}" if named else ""
    return (
        f"{takes}. If it needs more than images, or them by keyword or in a dict, give "
        f"wrap(module, forward=lambda m, x: ...)"
    )
