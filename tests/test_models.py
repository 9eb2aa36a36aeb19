"""Names, files and modules become models; what cannot says so in one line."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vitprobe import VitprobeError, cka, load_model, wrap
from vitprobe.models import loading as models
from vitprobe.running.session import session


def saved(module, path, **changes):
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    state.update(changes)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def test_every_alias_is_a_timm_model_with_these_weights():
    known = set(timm.list_pretrained())
    assert [alias for alias, name in models.ALIASES.items() if name not in known] == []


def test_random_weights_follow_the_seed_and_leave_the_callers_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = load_model("test_vit@random"), load_model("test_vit@random")
    assert torch.equal(torch.rand(3), expected)
    other = load_model("test_vit@random", seed=1)
    assert first.weights_sha256() == second.weights_sha256() != other.weights_sha256()
    assert first.name == "test_vit (random)" and first.untrained
    assert first.origin == "random (seed 0)" and not first.module.training


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_files_give_their_weights_head_and_digest(tmp_path, name):
    module = timm.create_model("test_vit", num_classes=7)
    path = saved(module, tmp_path / name)
    model = load_model(f"test_vit@{path}")
    assert model.module.num_classes == 7
    torch.testing.assert_close(model.module.state_dict(), module.state_dict())
    digest = model.details["file_sha256"]
    assert model.origin.startswith(f"test_vit, weights {name} (sha256 {digest[:8]}…)")
    assert len(digest) == 64
    assert str(tmp_path) not in str(model.provenance())


def test_a_checkpoint_with_its_wrapping(tmp_path):
    module = timm.create_model("test_resnet", num_classes=5)
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.pth")
    model = load_model(f"test_resnet@{tmp_path / 'c.pth'}")
    torch.testing.assert_close(model.module.state_dict(), module.state_dict())


def test_position_tables_are_resampled_and_the_transform_follows(tmp_path):
    module = timm.create_model("test_vit", num_classes=0, img_size=160)
    path = saved(module, tmp_path / "w.safetensors")
    model = load_model(f"test_vit@{path}", image_size=96)
    assert model.input_size == (3, 96, 96)
    assert model.module.pos_embed.shape[1] != module.pos_embed.shape[1]
    from PIL import Image

    assert model.transform(Image.new("RGB", (300, 200))).shape == (3, 96, 96)
    assert model.module(torch.zeros(1, 3, 96, 96)).ndim == 2
    assert load_model("test_resnet@random", image_size=64).input_size == (3, 64, 64)


def test_float16_weights_become_float32(tmp_path):
    module = timm.create_model("test_resnet").half()
    model = load_model(f"test_resnet@{saved(module, tmp_path / 'w.safetensors')}")
    assert next(model.module.parameters()).dtype == torch.float32


def test_a_float16_position_table_is_not_rounded_again_when_it_is_resampled(tmp_path):
    module = timm.create_model("test_vit", num_classes=0, img_size=160).half()
    torch.nn.init.normal_(module.pos_embed)
    wide = {name: tensor.float() for name, tensor in module.state_dict().items()}
    half = load_model(f"test_vit@{saved(module, tmp_path / 'half.safetensors')}", image_size=96)
    save_file(wide, tmp_path / "wide.safetensors")
    full = load_model(f"test_vit@{tmp_path / 'wide.safetensors'}", image_size=96)
    assert torch.equal(half.module.pos_embed, full.module.pos_embed)


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_weights_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_bytes(pickle.dumps({"state_dict": Malice()}))
    torch.save({"w": Malice()}, "v.pth")
    for name in ("w.pth", "v.pth"):
        with pytest.raises(VitprobeError, match="that can be read safely"):
            load_model(f"test_vit@{name}")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_b61@random", r"no such model: 'vit_b61'. Did you mean vit_b16"),
        ("resnet5O@random", r"no such model: 'resnet5O'. Did you mean resnet50"),
        ("resnet50.nope", r"no weights 'nope' for resnet50; it has a1_in1k, "),
        ("test_vit@weights.safetensors", r"no such weights file: .*weights\.safetensors"),
        ("@random", "has no name before its '@'"),
        ("", "has no name before its '@'"),
        ("vit_base_patch16_reg4_gap_256", "timm has no trained weights for"),
    ],
)
def test_wrong_specs_get_one_line(spec, message):
    with pytest.raises(VitprobeError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = saved(timm.create_model("test_resnet"), tmp_path / "w.safetensors")
    with pytest.raises(VitprobeError, match=r"do not fit the architecture\. Missing are all"):
        load_model(f"test_vit@{path}")
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    with pytest.raises(VitprobeError, match="neither a safetensors file nor a checkpoint"):
        load_model(f"test_vit@{empty}")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(VitprobeError, match="holds no state dict"):
        load_model(f"test_vit@{tmp_path / 'list.pt'}")


@pytest.mark.parametrize(("name", "size"), [("test_vit", 3), ("vgg11", 8)])
def test_an_image_size_that_does_not_fit_says_so(name, size):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(VitprobeError, match=rf"cannot run on images of \(3, {size}, {size}\): "):
        cka.measure(f"{name}@random", images, image_size=size)


def test_a_hub_out_of_reach_is_told_within_seconds_with_the_ways_on(monkeypatch, hub_cache):
    from huggingface_hub import constants

    # Nobody listens on the discard port.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before = constants.HF_HUB_OFFLINE
    start = time.monotonic()
    with pytest.raises(VitprobeError, match=r"hub cannot be reached. Try vit_b16@random") as e:
        load_model("vit_b16")
    assert time.monotonic() - start < 20
    assert "\n" not in str(e.value) and before == constants.HF_HUB_OFFLINE


def test_a_cached_file_is_used_though_the_hub_is_out_of_reach(monkeypatch, hub_cache):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    module = timm.create_model("test_vit")
    repository = hub_cache / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    saved(module, snapshot / "model.safetensors")
    model = load_model("test_vit.r160_in1k")
    torch.testing.assert_close(model.module.state_dict(), module.state_dict())
    assert model.origin == "test_vit.r160_in1k"


def test_hub_names_keep_their_own_revision(monkeypatch):
    seen = []
    monkeypatch.setattr(models, "create", lambda *args: seen.append(args[2]))
    load_model("hf-hub:owner/name@v1.0")
    assert seen == ["hf-hub:owner/name@v1.0"]


def test_wrap_gives_timm_models_their_own_transform_and_others_none():
    model = wrap(timm.create_model("test_vit"))
    assert model.input_size == (3, 160, 160) and model.transform is not None
    assert wrap(nn.Conv2d(3, 3, 1), name="mine").transform is None
    with pytest.raises(VitprobeError, match=r"a name or an nn.Module, not NoneType"):
        wrap(None)


def test_equal_names_are_told_apart():
    loaded = models.load_models(["test_vit@random", "test_vit@random", "test_vit@random"])
    assert [m.name for m in loaded] == [
        "test_vit (random)",
        "test_vit (random) #2",
        "test_vit (random) #3",
    ]


def test_wrapped_models_of_one_class_keep_their_own_transforms():
    pictures = np.full((4, 160, 160, 3), 100, dtype=np.uint8)
    mine = [
        wrap(timm.create_model("test_vit"), transform=lambda image, level=level: level)
        for level in (torch.zeros(3, 160, 160), torch.ones(3, 160, 160))
    ]
    with session(mine, pictures) as ready:
        dark, light = ready.example()
    assert dark.max() == 0 and light.min() == 1


def test_a_caption_tells_images_from_how_often_they_were_seen():
    assert load_model("resnet_box").origin == "bundled, trained on 80,000 images"
    little = load_model("resnet_box_10pct").origin
    assert little == "bundled, trained on 8,000 images, 10 times each"
    masked = "bundled, from masked pretraining on"
    assert load_model("vit_small_box").origin == (
        f"{masked} 316,672 images, then trained on 99,968 images"
    )
    assert load_model("vit_small_box_10pct").origin == (
        f"{masked} 10,000 images, 32 times each, then trained on 10,000 images, 10 times each"
    )


def test_no_alias_has_weights_that_timm_says_are_for_another_variant():
    for name in models.ALIASES.values():
        note = str(timm.get_pretrained_cfg(name).notes or "")
        assert "QuickGELU" not in note or "quickgelu" in name
    from timm.layers import QuickGELU

    clip = timm.create_model(models.ALIASES["clip_b16"].partition(".")[0], depth=1)
    assert isinstance(clip.blocks[0].mlp.act, QuickGELU)
