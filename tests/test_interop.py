"""Models of other libraries as they have them, where these are installed (extra ``interop``)."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import attention_distance, cka, skip_ratio, wrap


def test_a_peft_adapter_that_does_nothing_yet_leaves_the_numbers_of_its_base(pictures):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = timm.create_model("test_vit", img_size=64).eval()
    plain = wrap(base, "plain")
    wanted = attention_distance.measure(plain, pictures, workers=0).distance_px
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=["qkv"], r=2))
    adapted = wrap(lora, "lora")
    assert adapted.transform_key == plain.transform_key
    found = attention_distance.measure(adapted, pictures, workers=0)
    np.testing.assert_allclose(found.distance_px, wanted, atol=1e-4)
    both = cka.measure([adapted], pictures, workers=0)
    assert np.isfinite(both.cka).all()


def test_a_clip_in_mixed_precision(tensors):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.model.CLIP(32, vision, text).eval()
    whole = cka.measure(wrap(clip.visual, "CLIP"), tensors, device="cpu").cka
    open_clip.model.convert_weights_to_lp(clip, torch.float16)
    types = {parameter.dtype for parameter in clip.visual.parameters()}
    assert types == {torch.float16, torch.float32}
    half = cka.measure(wrap(clip.visual, "CLIP"), tensors, device="cpu").cka
    np.testing.assert_allclose(half, whole, atol=0.02)
    # The whole model takes images and text.
    encoded = wrap(clip.float(), forward=lambda m, x: m.encode_image(x))
    images = cka.measure(encoded, tensors, layers="visual.transformer.resblocks.?")
    assert len(images.layers) == 2


def test_transformers_models_with_dicts_in_and_out(pictures):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=64, image_size=32, patch_size=8)  # fmt: skip
    model = transformers.ViTModel(config).eval()

    def processor(image):
        pixels = np.asarray(image.resize((32, 32)), np.float32).transpose(2, 0, 1) / 255
        return transformers.BatchFeature({"pixel_values": [pixels]})

    by_position = wrap(model, "ViT", processor)
    by_keyword = wrap(model, "ViT", processor, forward=lambda m, x: m(pixel_values=x))
    for measure in (cka.measure, skip_ratio.measure):
        found = [measure(one, pictures, workers=0) for one in (by_position, by_keyword)]
        for name, array in found[0].arrays().items():
            if array.dtype.kind == "f":
                np.testing.assert_array_equal(found[1].arrays()[name], array)


def test_a_lightning_module(tensors):
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))

        def forward(self, x):
            return self.net(x)

    module = Lit()
    found = cka.measure(module, tensors, layers=["net.0", "net.2"])
    plain = cka.measure(module.net, tensors, layers=["0", "2"])
    np.testing.assert_array_equal(found.cka, plain.cka)
