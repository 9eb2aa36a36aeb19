"""No reader of a file executes what is in it: a pickle is refused, and its call is not made."""

import ast
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import vitprobe
from vitprobe import load_result
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.contents import read
from vitprobe.running.checkpoint import Checkpoint
from vitprobe.running.features import open_features


class Calls:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def evil(tmp_path):
    """An array that holds a call; at the end the call must not have been made."""
    mark = tmp_path / "executed"
    yield np.array(Calls(mark), dtype=object)
    assert not mark.exists()


def test_a_pickle_does_leave_a_mark(tmp_path):
    """Else none of the tests below could fail."""
    np.save(tmp_path / "a.npy", np.array(Calls(tmp_path / "mark"), dtype=object))
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "mark").exists()


def test_state_files(evil, tmp_path):
    state = {"total": torch.zeros(2, dtype=torch.float64)}
    run = Checkpoint(tmp_path / "run", {"seed": 0}, 3, 0)
    done = np.array([True, False, False])
    run.save(state, done)
    assert run.load(state).tolist() == done.tolist()
    for name in ("total", "_key", "_done", "other"):
        held = {"_key": np.array(run.key), "_done": done, "total": np.zeros(2), name: evil}
        with next(tmp_path.glob("run.*.partial")).open("wb") as file:
            np.savez(file, **held)
        assert not run.load(state).any()


def test_result_files(evil, tmp_path):
    file = tmp_path / "r.npz"
    meta = json.dumps({"analysis": "cka", "models": [{"name": "a", "weights": "w"}]})
    for held in ({"meta": evil}, {"meta": np.array(meta), "cka": evil}):
        np.savez(file, **held)
        with pytest.raises(VitprobeError, match="not a result file"):
            load_result(file)


def test_images(evil, tmp_path):
    np.save(tmp_path / "i.npy", evil)
    np.savez(tmp_path / "i.npz", images=evil)
    np.savez(tmp_path / "l.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=evil)
    for name in ("i.npy", "i.npz"):
        with pytest.raises(VitprobeError):
            open_images(tmp_path / name)
    # What needs no labels does without them; who asks for them is told.
    images = open_images(tmp_path / "l.npz")
    assert images.labels is None and "not Python objects" in images.no_labels


def test_weights(evil, tmp_path):
    np.savez(tmp_path / "w.npz", kernel=evil)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": evil.item()}, tmp_path / "w.pt")
    torch.save(evil.item(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(VitprobeError):
        read(tmp_path / "w.npz")
    for name in ("w.pt", "old.pt"):
        with suppress(VitprobeError):  # refused, or read around: the mark tells
            read(tmp_path / name)


def test_features(evil, tmp_path):
    np.save(tmp_path / "f.npy", evil)
    np.savez(tmp_path / "f.npz", layer=evil)
    folder = tmp_path / "extracted" / "model"
    folder.mkdir(parents=True)
    np.save(folder / "layer.npy", evil)
    meta = {"models": [{"name": "model"}], "layers": {"layer": {"file": "layer.npy"}}}
    for file in ("meta.json", "features.json"):
        (folder / file).write_text(json.dumps(meta))
    for path in ("f.npy", "f.npz", "extracted/model"):
        with pytest.raises(VitprobeError):
            open_features(tmp_path / path)


def test_no_reader_allows_pickles():
    """Those to come are in no test above."""
    for path in Path(vitprobe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            told = {one.arg: ast.unparse(one.value) for one in node.keywords}
            assert told.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
            if name == "torch.load":
                assert told.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load")
