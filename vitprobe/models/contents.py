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

from vitprobe.errors import VitprobeError, nearest, ran_out
from vitprobe.models.unpickling import StandIn, load, of_module, scripted

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
# How deep dicts of weights, and modules in modules, are looked for.
MAX_DEPTH, MAX_PARTS = 8, 40
# Weights hardly get smaller when they are packed; an archive beyond this is to fill the memory.
MAX_RATIO = 20


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
    try:
        file, shown = _file_of(path)
        with file.open("rb") as opened:
            opened.read(1)
    except OSError as error:
        raise VitprobeError(
            f"--models: the weights file {str(path)[:200]!r} cannot be read: {error.strerror}."
        ) from error
    beside = file.name in IN_FOLDERS
    config = read_json(file.with_name("config.json")) if beside else {}
    preprocessor = read_json(file.with_name("preprocessor_config.json")) if beside else {}
    if file.name.endswith(".index.json"):
        tree, digest = _shards(file)
        return Contents(shown, tree, digest, file, False, config, preprocessor)
    tree, npz = _read(file)
    return Contents(shown, tree, file_sha256(file), file, npz, config, preprocessor)


def _file_of(path: Path) -> tuple[Path, str]:
    """The file to read and what captions call it."""
    if path.is_dir():
        return _in_folder(path), path.resolve().name
    if not path.is_file():
        if path.exists():
            raise VitprobeError(f"--models: {str(path)!r} is not a regular file.")
        if path.is_symlink():
            raise VitprobeError(f"--models: {str(path)!r} is a link that leads nowhere.")
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VitprobeError(
            f"--models: no such weights file: {str(path)!r}.{nearest(path.name, siblings)}"
        )
    return path, path.name


def state_dicts(tree: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict of tensors in a checkpoint, with the dotted path to it."""
    yield from _state_dicts(tree, (), set())


def _state_dicts(
    tree: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    # Parts that hold each other would have no end.
    if len(path) > MAX_DEPTH or id(tree) in seen:
        return
    if of_module(tree):
        yield ".".join(path), dict(_of_module(tree))
        return
    if isinstance(tree, StandIn):
        tree = vars(tree)
    if isinstance(tree, Mapping):
        inside = {str(key): value for key, value in tree.items()}
    elif isinstance(tree, list | tuple):
        inside = {str(i): value for i, value in enumerate(tree)}
    else:
        return
    seen.add(id(tree))
    tensors = {k: v for k, v in inside.items() if isinstance(v, Tensor) and not v.is_meta}
    if tensors:
        yield ".".join(path), tensors
    for key, value in inside.items():
        yield from _state_dicts(value, (*path, key), seen)


def class_names(tree: Any, depth: int = 0) -> set[str]:
    """Names of the classes of all modules that a file holds as such."""
    found: set[str] = set()
    if depth > MAX_PARTS:
        return found
    inside = vars(tree) if isinstance(tree, StandIn) else tree
    if of_module(tree):
        found.add(type(tree).__name__)
        inside = inside if scripted(tree) else inside["_modules"]
    elif depth > MAX_DEPTH:
        return found
    for part in inside.values() if isinstance(inside, Mapping) else ():
        found |= class_names(part, depth + 1)
    return found


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
    found = read_json(index).get("weight_map")
    shards: dict[str, Any] = found if isinstance(found, dict) else {}
    names = sorted(set(map(str, shards.values())))
    if not names:
        raise VitprobeError(f"{index} names no shards of weights.")
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for name in names:
        shard = index.with_name(Path(name).name or "?")
        if not shard.is_file():
            raise VitprobeError(f"{index.name} names {name}, which is not beside it.")
        part = dict(_read(shard)[0])
        # What lies in a second shard as well is taken from where the index says.
        tensors.update({key: value for key, value in part.items() if shards.get(key, name) == name})
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
    except VitprobeError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        # Readers of damaged files raise anything; whatever it is, the file is the reason.
        raise VitprobeError(
            f"{path} is neither a safetensors file nor a checkpoint of torch nor an .npz that can "
            f"be read safely ({type(error).__name__}).{_way_on(error)}"
        ) from error


def _way_on(error: Exception) -> str:
    """What to do about an error of torch's restricted loader, where that is known."""
    if "Unsupported operand" in str(error):
        return (
            " torch's restricted loader reads pickle protocol 2 only: save the file again with "
            "torch.save, without pickle_protocol, or as safetensors."
        )
    return ""


def _is_npz(path: Path) -> bool:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        unfolded = sum(one.file_size for one in archive.infolist())
        if unfolded > MAX_RATIO * path.stat().st_size:
            raise VitprobeError(
                f"{path} would unfold to {unfolded / 2**30:.1f} GiB, {MAX_RATIO} times its size "
                f"and more: weights are not packed like that."
            )
        return all(name.endswith(".npy") for name in archive.namelist())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file or no object in it."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VitprobeError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _of_module(module: StandIn, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    inside = vars(module)
    parts, tensors = inside, inside
    if not scripted(module):
        temporary = inside.get("_non_persistent_buffers_set") or ()
        held = {**(inside.get("_parameters") or {}), **(inside.get("_buffers") or {})}
        tensors = {name: value for name, value in held.items() if name not in temporary}
        parts = inside.get("_modules") or {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
    for name, part in parts.items():
        if of_module(part) and depth < MAX_PARTS:
            yield from _of_module(part, f"{prefix}{name}.", depth + 1)
