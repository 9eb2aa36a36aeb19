"""One's own code as a model: ``package.module:factory`` or ``mine.py:build``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprobe.errors import VitprobeError, is_error, nearest
from vitprobe.models.contents import file_sha256
from vitprobe.models.model import Model
from vitprobe.models.names import factory_parts, label
from vitprobe.models.wrapping import wrap


def from_factory(spec: str, seed: int) -> Model:
    """What a factory makes when it is called without arguments.

    It may return an ``nn.Module`` or, with a transform, what ``vitprobe.wrap`` returns. A module
    under the name in place of a factory is taken as it is.

    Args:
        spec: ``WHERE:NAME``, where WHERE is a module that Python finds, or a ``.py`` file.
        seed: of its random weights; the caller's random state is left as it was.

    Raises:
        VitprobeError: no such module, file or name; whatever the code raises; no ``nn.Module``.
    """
    where, name = factory_parts(spec)
    with _beside(where), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = _imported(spec, where)
        for part in name.split("."):
            if not hasattr(made, part):
                raise VitprobeError(f"{where} has no {name}.{nearest(part, dir(made))}")
            made = getattr(made, part)
        if not isinstance(made, nn.Module | Model):
            made = _called(spec, made)
    if not isinstance(made, nn.Module | Model):
        raise VitprobeError(
            f"{spec} gives {type(made).__name__}; an nn.Module is expected, or what "
            f"vitprobe.wrap(module, transform=...) returns."
        )
    model = made if isinstance(made, Model) else wrap(made)
    details: dict[str, Any] = dict(model.details)
    if where.endswith(".py"):
        path = Path(os.path.expanduser(where))
        details |= {"file": path.name, "file_sha256": file_sha256(path)}
    model.module.eval()
    return replace(model, name=label(spec), origin=f"made by {_shown(spec)}", details=details)


def _imported(spec: str, where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(os.path.expanduser(where))
        if not path.is_file():
            raise VitprobeError(f"--models: no such file: {where!r}.")
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        # Classes of the file look themselves up there; what has the name already stays.
        sys.modules.setdefault(path.stem, module)
        found.loader.exec_module(module)
        return module
    except VitprobeError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            raise VitprobeError(f"--models: there is no Python module {where!r}.") from error
        raise VitprobeError(f"{spec}: {type(error).__name__}: {error}") from error
    except BaseException as error:
        if not is_error(error):
            raise
        # It is the user's own code: it may raise anything.
        raise VitprobeError(f"{spec}: {_told(error)}") from error


def _called(spec: str, factory: Any) -> Any:
    if not callable(factory):
        raise VitprobeError(f"{spec} is {type(factory).__name__}, which cannot be called.")
    try:
        return factory()
    except BaseException as error:
        if not is_error(error):
            raise
        raise VitprobeError(f"{spec}: {_told(error)}") from error


def _told(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]


def _shown(spec: str) -> str:
    """Without the folder that a file is in."""
    where, name = factory_parts(spec)
    return f"{Path(where).name if where.endswith('.py') else where}:{name}"


@contextmanager
def _beside(where: str) -> Iterator[None]:
    """Modules beside the file, or in the working folder, are found as Python would find them."""
    folder = Path(os.path.expanduser(where)).parent if where.endswith(".py") else Path()
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
