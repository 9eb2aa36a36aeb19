"""torch's checkpoints read with torch's restricted loader; what it does not know stays inert.

A training script saves its settings, counters and random states beside the weights. Their classes
may be anything. Nothing in a file may be executed, so each is replaced by a stand-in that takes
whatever it is given, does nothing with it, and keeps the plain values of its state.
"""

from __future__ import annotations

import io
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

# Objects of these classes are filled like plain dicts and lists, which the loader does for these
# two alone; of other classes it turns out while reading.
FILLED_LIKE = {
    "collections.defaultdict": OrderedDict,
    "collections.deque": list,
    "torch.utils.data.sampler.deque": list,
}
# In front of the data in files from before torch 1.6: magic number, version, system.
LEGACY_HEADERS = 3
# What tells an archive of TorchScript from a checkpoint, and where its code is.
CONSTANTS, CODE = "constants.pkl", "code"
# In names of TorchScript's classes.
SCRIPTED = "__torch__"


class StandIn:
    """Stands for an object of unknown code; its state, where that is a dict, is in ``vars``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({k: v for k, v in part.items() if isinstance(k, str)})


def load(path: Path) -> Any:
    """What ``torch.save`` wrote, with stand-ins for all that torch does not read as plain data.

    Raises:
        Exception: of any kind, where the file is damaged or no checkpoint of torch.
    """
    source: Any = _without_code(path)
    stand_ins = {name: _stand_in(name, FILLED_LIKE.get(name)) for name in _unknown(source)}
    while True:
        try:
            # Tuples give the name in the file for which each object stands.
            with (
                torch.serialization.safe_globals([(one, name) for name, one in stand_ins.items()]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                # torch goes by the ending of a path; what a file is shows in its bytes.
                file = source if isinstance(source, io.BytesIO) else source.open("rb")
                file.seek(0)
                with nullcontext() if file is source else file:
                    return torch.load(file, map_location="cpu", weights_only=True)
        except (UnpicklingError, TypeError) as error:
            wrong = _filled(str(error), stand_ins)
            if wrong is None:
                raise
            stand_ins[wrong[0]] = _stand_in(*wrong)


def _stand_in(name: str, like: type | None = None) -> Any:
    module, _, short = name.rpartition(".")
    body = {"__module__": module, "__qualname__": short}
    if like is None:
        return type(short, (StandIn,), body)
    # A subclass of dict or list: the loader fills nothing but these themselves.
    return type(short, (), {**body, "__new__": lambda cls, *args, **kwargs: like()})


def _filled(reason: str, stand_ins: dict[str, Any]) -> tuple[str, type] | None:
    """Which stand-in was to be filled, and like what."""
    for name, one in stand_ins.items():
        if not issubclass(one, StandIn):
            continue
        # torch before 2.7 leaves it to Python to refuse.
        if reason == f"'{one.__name__}' object does not support item assignment":
            return name, OrderedDict
        if f"but got {one}" in reason:
            if "SETITEM" in reason:
                return name, OrderedDict
            if "append" in reason:
                return name, list
    return None


def of_module(thing: Any) -> bool:
    """Whether a stand-in stands for a module: one that was saved whole, or one of TorchScript."""
    if not isinstance(thing, StandIn):
        return False
    return isinstance(vars(thing).get("_modules"), dict) or scripted(thing)


def scripted(thing: StandIn) -> bool:
    """Whether a stand-in stands for a module of TorchScript, which holds its parts as its own."""
    return SCRIPTED in str(type(thing).__module__).split(".")


def _without_code(path: Path) -> Path | io.BytesIO:
    """The file itself; of an archive of TorchScript its data alone, as a checkpoint has them."""
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        parts = {name: name.split("/")[1:] for name in archive.namelist()}
        if [CONSTANTS] not in parts.values():
            return path
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as copy:
            for name, inside in parts.items():
                if inside and inside[0] not in (CONSTANTS, CODE, "constants"):
                    copy.writestr(name, archive.read(name))
    data.seek(0)
    return data


def _unknown(source: Path | io.BytesIO) -> list[str]:
    """Names of what the file refers to and torch does not know as harmless."""
    if isinstance(source, io.BytesIO):
        return torch.serialization.get_unsafe_globals_in_checkpoint(source)
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(source))
    except ValueError:
        pass  # no zip: a file from before torch 1.6, or none of torch's
    with source.open("rb") as file:
        try:
            for _ in range(LEGACY_HEADERS):
                list(pickletools.genops(file))
            return sorted(set(_globals(file)))
        except ValueError:
            return []


def _globals(file: Any) -> Iterator[str]:
    # The loader looks its own names up first, so that those among these do no harm.
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # Pickles of this age have Python 2's names.
            module, name = NAME_MAPPING.get((module, name), (module, name))
            yield f"{IMPORT_MAPPING.get(module, module)}.{name}"
