"""Models of the user's own code: found, called without arguments, labelled by it."""

from pathlib import Path

import pytest
import torch

from vitprobe import VitprobeError, load_model
from vitprobe.models.names import label

MINE = """
from parts import Block
import vitprobe
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), Block())

def whole():
    return vitprobe.wrap(build(), name="x", transform=lambda image: image, input_size=(3, 8, 8))

ready = build()

def broken():
    raise KeyError("no such\\nwidth")

def number():
    return 3

def with_arguments(width):
    return build()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_models.py").write_text(MINE)
    (folder / "parts.py").write_text("from torch import nn\nclass Block(nn.ReLU): pass\n")
    monkeypatch.chdir(tmp_path)


def test_a_file_s_function_makes_the_model_and_names_it():
    model = load_model("code/own_models.py:build")
    assert model.name == "own_models:build" and not model.module.training
    assert model.origin == "made by own_models.py:build" and not model.untrained
    assert len(model.details["file_sha256"]) == 64
    assert model.module(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 2, 2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again = (load_model("code/own_models.py:build", seed=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert first.weights_sha256() == again.weights_sha256() != model.weights_sha256()
    assert load_model("code/own_models.py:ready").name == "own_models:ready"


def test_what_wrap_returns_keeps_its_transform():
    model = load_model("code/own_models.py:whole", name="mine")
    assert model.name == "mine" and model.input_size == (3, 8, 8) and model.transform(5) == 5


def test_a_module_that_python_finds():
    pytest.importorskip("torchvision")
    model = load_model("torchvision.models:squeezenet1_1")
    assert model.name == "models:squeezenet1_1"
    assert model.origin == "made by torchvision.models:squeezenet1_1"
    # Only what can be code is taken for it.
    assert label("hf-hub:me/net") == "me/net" and label("test_vit@a:b.pth") == "a:b"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("code/own_models.py:biuld", r"own_models\.py has no biuld\. Did you mean build"),
        ("code/nothing.py:build", r"no such file: 'code/nothing\.py'"),
        ("nothing_there.models:build", r"no Python module 'nothing_there\.models'"),
        ("code/own_models.py:broken", r"broken: KeyError: 'no such\\nwidth'"),
        ("code/own_models.py:number", r"gives int; an nn\.Module is expected"),
        ("code/own_models.py:with_arguments", "TypeError: with_arguments"),
    ],
)
def test_what_goes_wrong_gets_one_line(spec, message):
    with pytest.raises(VitprobeError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)
    assert Path("code").is_dir()
