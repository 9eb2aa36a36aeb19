"""Weights files as people have them, read without executing anything in them.

What a file is shows in its first bytes, not in its suffix: safetensors, a checkpoint of torch, or
Google's ``.npz``; an index of shards, or a folder that holds one of these, stand for their files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vitprobe.errors import VitprobeError, nearest
from vitprobe.models.unpickling import StandIn, load

# A folder's weights, as timm, transformers and open_clip name them; first come, first served.
IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar", ".npz")
# Downloads that are no weights: the file that stands for one under Git LFS, an error's page.
NO_WEIGHTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the weights: git lfs pull gets them",
    b"<!doctype html": "is a web page, not weights",
    b"<html": "is a web page, not weights",
}
MAX_DEPTH = 8


@dataclass(frozen=True)
class Contents:
    """What a weights file holds.

    Attributes:
        file: its name, or the folder's.
        tree: dicts, lists and stand-ins with tensors somewhere; arrays for ``npz``.
        sha256: of the file, or of the digests of all its shards.
        path: of the file that was read; of an index its own.
        npz: whether it is Google's layout, which timm's networks read themselves.
        config: the ``config.json`` beside it, if the file's name says that it is about it.
        preprocessor: likewise ``preprocessor_config.json``.
    """

    file: str
    tree: Any
    sha256: str
    path: Path
    npz: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """What provenance holds of the file."""
        return {"file": self.file, "file_sha256": self.sha256}


def read(path: Path) -> Contents:
    """Read a weights file, an index of shards, or the folder that they are in.

    Raises:
        VitprobeError: no such file, several in a folder, or none that can be read safely.
    """
    if path.is_dir():
        file, shown = _in_folder(path), path.resolve().name
    else:
        file, shown = path, path.name
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise VitprobeError(
            f"--models: no such weights file: {str(file)!r}.{nearest(file.name, siblings)}"
        )
    beside = file.name in IN_FOLDERS
    config = read_json(file.with_name("config.json")) if beside else {}
    preprocessor = read_json(file.with_name("preprocessor_config.json")) if beside else {}
    if file.name.endswith(".index.json"):
        tree, digest = _shards(file)
        return Contents(shown, tree, digest, file, False, config, preprocessor)
    tree, npz = _read(file)
    return Contents(shown, tree, file_sha256(file), file, npz, config, preprocessor)


def state_dicts(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict of tensors in a checkpoint, with the dotted path to it."""
    if isinstance(tree, StandIn):
        inside = vars(tree)
        if isinstance(inside.get("_modules"), dict):
            # A module that was saved whole: its parts are stand-ins as well.
            yield ".".join(path), dict(_of_module(tree))
            return
        tree = inside
    if not isinstance(tree, Mapping) or len(path) > MAX_DEPTH:
        return
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor) and not v.is_meta}
    if tensors:
        yield ".".join(path), tensors
    for key, value in tree.items():
        yield from state_dicts(value, (*path, str(key)))


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _in_folder(folder: Path) -> Path:
    for name in IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS) and p.is_file())
    if len(found) == 1:
        return found[0]
    what = f"several weights files, {', '.join(p.name for p in found[:5])}: name one of them"
    raise VitprobeError(f"The folder {folder} holds {what if found else 'no weights file'}.")


def _shards(index: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of all shards that an index names."""
    names = sorted(set(dict(read_json(index).get("weight_map") or {}).values()))
    if not names:
        raise VitprobeError(f"{index} names no shards of weights.")
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for name in names:
        shard = index.with_name(Path(str(name)).name)
        if not shard.is_file():
            raise VitprobeError(f"{index.name} names {name}, which is not beside it.")
        tensors.update(_read(shard)[0])
        digest.update(file_sha256(shard).encode())
    return tensors, digest.hexdigest()


def _read(path: Path) -> tuple[Any, bool]:
    with path.open("rb") as file:
        start = file.read(32)
    for beginning, what in NO_WEIGHTS.items():
        if start.lower().startswith(beginning):
            raise VitprobeError(f"{path} {what}.")
    try:
        # After eight bytes that say how long it is comes a header in JSON.
        if start[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path), False
        if start.startswith(b"PK") and _is_npz(path):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}, True
        return load(path), False
    except Exception as error:
        # Readers of damaged files raise anything; whatever it is, the file is the reason.
        raise VitprobeError(
            f"{path} is neither a safetensors file nor a checkpoint of torch nor an .npz that can "
            f"be read safely ({type(error).__name__})."
        ) from error


def _is_npz(path: Path) -> bool:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file or no object in it."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VitprobeError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _of_module(module: StandIn, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    inside = vars(module)
    temporary = inside.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (inside.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in temporary:
                yield f"{prefix}{name}", value.detach()
    for name, part in (inside.get("_modules") or {}).items():
        if isinstance(part, StandIn):
            yield from _of_module(part, f"{prefix}{name}.")
