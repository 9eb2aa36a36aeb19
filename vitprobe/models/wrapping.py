"""Anybody's module as a model: shells taken off, a forward pass of the user's own put in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from vitprobe.errors import VitprobeError
from vitprobe.models.creation import config_of
from vitprobe.models.model import Model
from vitprobe.models.transforms import timm_transform


def wrap(
    module: nn.Module,
    name: str | None = None,
    transform: Callable[[Any], Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> Model:
    """Any ``nn.Module`` as a model.

    Compiled and data-parallel modules are measured as the module inside them, which computes the
    same.

    Args:
        module: takes a float tensor (n, C, H, W); its outputs may be tensors, tuples or dicts.
        name: what figures call it; its class name by default.
        transform: PIL image -> tensor or array (C, H, W), or a dict with it under
            ``pixel_values``. Without one, timm's models get their own and other modules can be
            given tensors only.
        input_size: (C, H, W), where known.
        forward: how to call it, for a module that takes more than images or takes them by
            keyword: ``lambda m, x: m(pixel_values=x)``. It gets the module and the images.

    Raises:
        VitprobeError: no ``nn.Module``, or one whose steps cannot be watched.
    """
    if not isinstance(module, nn.Module):
        what = type(module).__name__
        more = " Give the module it was exported from." if what == "ExportedProgram" else ""
        raise VitprobeError(f"A model must be a name or an nn.Module, not {what}.{more}")
    module = unwrapped(module)
    name = name or type(module).__name__
    _check_watchable(module, name)
    timm_name = key = ""
    # Adapters hand on the attributes of the network inside them.
    if transform is None and isinstance(
        getattr(module, "pretrained_cfg", None), dict | PretrainedCfg
    ):
        transform, size, key = timm_transform(module, input_size[1] if input_size else None)
        input_size = input_size or size
        timm_name = str(config_of(module).get("architecture") or "")
    if forward is not None:
        module = OwnForward(module, forward)
    return Model(name, module, transform, input_size, timm_name=timm_name, transform_key=key)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    shells = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(module, shells):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _check_watchable(module: nn.Module, name: str) -> None:
    """Refuse modules whose operations do not go through Python, or are not there yet."""
    for path, part in module.named_modules():
        inside = f"{name}.{path}" if path else name
        if isinstance(part, torch.jit.ScriptModule) and (
            not path or next(part.parameters(), None) is not None
        ):
            raise VitprobeError(
                f"{inside} is TorchScript, which runs where its layers cannot be watched: give the "
                f"Python module that it was made from."
            )
        if _is_exported(part):
            raise VitprobeError(
                f"{inside} is an exported program, which runs without the modules that its layers "
                f"were: give the module that it was made from."
            )
    for key, parameter in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(parameter):
            raise VitprobeError(
                f"{key} of {name} has no shape yet: run the module once on images before."
            )
        if parameter.is_meta:
            raise VitprobeError(
                f"{key} of {name} has no numbers (it is on the device 'meta'): load weights first, "
                f"or create the module on a device that has memory."
            )


def _is_exported(module: nn.Module) -> bool:
    graph = getattr(module, "graph", None)
    if not isinstance(graph, torch.fx.Graph):
        return False
    return any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes)


class OwnForward(nn.Module):
    """A module under a forward pass of the user's own; its layers keep their names.

    It shares the submodules, parameters and buffers of the module, and hands on every other
    attribute of it.

    Args:
        module: the user's.
        forward: ``forward(module, images)``, run in place of the module's own.
    """

    def __init__(self, module: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        # The module is no submodule: its layers would get other names.
        vars(self)["_module"] = module
        super().__init__()
        vars(self).update(
            _forward=forward,
            _modules=module._modules,
            _parameters=module._parameters,
            _buffers=module._buffers,
            _non_persistent_buffers_set=module._non_persistent_buffers_set,
        )

    # nn.Module keeps its mode as an attribute: here it is the module's.
    @property
    def training(self) -> bool:
        return vars(self)["_module"].training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_forward" in vars(self):
            vars(self)["_module"].training = mode

    def train(self, mode: bool = True) -> OwnForward:
        vars(self)["_module"].train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_module"], name)

    def forward(self, images: Tensor) -> Any:
        return self._forward(self._module, images)
