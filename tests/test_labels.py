"""Every network is called what it is: by its file, its folder, or the name that was given."""

import json

import numpy as np
import pytest
import timm
from safetensors.torch import save_file

from vitprobe import VitprobeError, cka, load_model, load_result, patch_embedding, wrap
from vitprobe import position_embedding as positions
from vitprobe.models.loading import load_models
from vitprobe.models.names import label
from vitprobe.report.command import main as report

IMAGES = np.random.default_rng(0).integers(0, 255, (8, 160, 160, 3), np.uint8)
FEW = ["--num-images", "8", "--batch-size", "4", "--quiet"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two networks of one architecture, in files of the user's own names."""
    folder = tmp_path_factory.mktemp("weights")
    paths = [folder / "before.safetensors", folder / "after.safetensors"]
    for path in paths:
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return paths


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("vit_small_patch14_dinov2@mine.safetensors", "mine"),
        ("dinov2_s14@runs/last.pth.tar", "last"),
        ("test_vit@mine.v2.ckpt", "mine.v2"),
        ("vit_b16@model.safetensors.index.json", "model"),
        ("vit_small_box@a/b.pth", "b"),
        ("test_vit@weights", "weights"),
        ("test_vit@random", "test_vit (random)"),
        ("test_vit.r160_in1k", "test_vit.r160_in1k"),
        ("hf-hub:me/net@v2", "me/net@v2"),
        ("local-dir:runs/mine", "mine"),
        # A file that is called like a public network is not that network.
        ("dinov2_s14@dinov2_s14.safetensors", "dinov2_s14 (file)"),
        ("vit_b16@vit_tiny_patch16_224.dino.npz", "vit_tiny_patch16_224.dino (file)"),
        ("local-dir:resnet50", "resnet50 (file)"),
    ],
)  # fmt: skip
def test_labels_are_of_the_weights_not_of_the_architecture(spec, expected):
    assert label(spec) == expected


def test_a_file_is_called_by_its_name_and_the_caption_tells_the_rest(files):
    model = load_model(f"test_vit.r160_in1k@{files[0]}")
    digest = model.details["file_sha256"]
    assert model.name == "before"
    # The public weights of the same architecture are named for the transform alone.
    assert model.origin == (
        f"test_vit, weights before.safetensors (sha256 {digest[:8]}…); "
        f"transform of test_vit.r160_in1k"
    )
    details = {**model.provenance(), "transform": "", "weights": "", "transform_of": ""}
    assert "r160" not in json.dumps(details)
    result = cka.measure(model, IMAGES, batch_size=4)
    assert f"before: {model.origin}" in result._caption().replace("\n", " ")


def test_two_files_of_one_architecture_in_one_figure(files, tmp_path):
    models = [f"test_vit@{path}" for path in files]
    result = cka.measure(models, IMAGES, batch_size=4)
    titles = [ax.get_title() for ax in result.plot().axes if ax.get_title()]
    assert titles == ["before", "after", "before × after"]
    origins = [model["weights"] for model in result.meta["models"]]
    assert origins[0] != origins[1]
    # Equal stems in two folders are told apart, in the figure and by their digests.
    other = tmp_path / "before.safetensors"
    other.write_bytes(files[1].read_bytes())
    twins = load_models([models[0], f"test_vit@{other}"])
    assert [model.name for model in twins] == ["before", "before #2"]
    assert twins[0].origin != twins[1].origin


def test_the_file_of_a_result_is_called_by_the_weights(files, tmp_path, capsys):
    models = [f"test_vit@{path}" for path in files]
    arguments = ["--models", *models, *FEW, "--out", str(tmp_path)]
    assert cka.main(arguments) == 0
    assert load_result(tmp_path / "cka-before-after.npz").models == ["before", "after"]
    assert cka.main([*arguments, "--names", "no pretext", "A@random"]) == 0
    assert load_result(tmp_path / "cka-no_pretext-A_random.npz").models == [
        "no pretext",
        "A@random",
    ]
    capsys.readouterr()


def test_a_folder_that_says_what_it_began_from_is_not_called_that(tmp_path):
    module = timm.create_model("test_vit.r160_in1k", pretrained=False, num_classes=7)
    folder = tmp_path / "finetuned"
    timm.models.save_for_hf(module, folder, safe_serialization=True)
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["tag"] == "r160_in1k"
    model = load_model(f"local-dir:{folder}")
    digest = model.details["file_sha256"]
    assert model.name == "finetuned" and model.module.num_classes == 7
    assert model.origin == f"test_vit, weights of local-dir:finetuned (sha256 {digest[:8]}…)"
    told = json.dumps(model.provenance())
    assert "r160_in1k" not in told and str(tmp_path) not in told


def test_names_are_given_to_loaded_wrapped_and_measured_models(files):
    spec = f"test_vit@{files[0]}"
    assert load_model(spec, name="A").name == "A"
    assert wrap(timm.create_model("test_vit"), name="B").name == "B"
    given = [spec, load_model("test_vit@random")]
    for module in (cka, positions, patch_embedding):
        data = [IMAGES] if module is cka else []
        few = {"batch_size": 4} if module is cka else {}
        assert module.measure(given, *data, names=["A", "B"], **few).models == ["A", "B"]
    assert cka.measure(spec, IMAGES, names="A", batch_size=4).models == ["A"]
    pairs = cka.measure([*given, given[0], spec], IMAGES, pairwise=True, names=["A", "B"])
    assert pairs.models == ["A", "B"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A"], r"--names gives 1 name for 2 models: A\."),
        (["A", "B", "C"], r"--names gives 3 names for 2 models: A, B, C\."),
        (["A", "A"], r"--names gives the name 'A' twice\."),
        (["A", " "], r"--names gives an empty name\."),
    ],
)
def test_wrong_names_get_one_line_before_anything_is_loaded(names, message, capsys, tmp_path):
    specs = ["test_vit@random", "there_is_no_such_model"]
    with pytest.raises(VitprobeError, match=message):
        load_models(specs, names=names)
    for main in (cka.main, positions.main, report):
        assert main(["--models", *specs, "--names", *names, "--out", str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "--names gives" in told


def test_a_report_calls_models_by_their_names_though_a_measurement_lacks_one(tmp_path, capsys):
    arguments = ["--models", "vit_small_box", "resnet_box", "--names", "ours", "theirs"]
    only = ["--only", "position_embedding", "attention_distance", "--num-images", "4"]
    assert report([*arguments, *only, "--out", str(tmp_path), "--quiet"]) == 0
    page = (tmp_path / "report-ours-theirs.html").read_text(encoding="utf-8")
    assert "Inside ours and theirs" in page
    distance = load_result(tmp_path / "report-ours-theirs-attention_distance.npz")
    assert distance.models == ["ours"]
    capsys.readouterr()
