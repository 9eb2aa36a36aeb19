"""Long runs do not die of one image: batches with values that are not finite."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitprobe import attention_distance, cka, load_model, receptive_field, skip_ratio, wrap
from vitprobe.errors import VitprobeError
from vitprobe.tracing import attention as observer

N, BATCH, BAD = 12, 4, 7


@pytest.fixture
def images():
    pixels = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels[BAD, 0, 3, 3] = torch.nan
    return pixels


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return wrap(timm.create_model("test_vit", img_size=32).eval(), "m")


def bad_batch():
    """Positions of the images that share a batch with the bad one."""
    order = np.random.default_rng(0).permutation(N)
    return next(part for part in np.split(order, N // BATCH) if BAD in part)


@pytest.mark.parametrize("measurement", [cka, skip_ratio, attention_distance])
def test_the_image_is_named_and_the_way_on(measurement, images, model):
    with pytest.raises(VitprobeError, match="not finite") as caught:
        measurement.measure(model, images, batch_size=BATCH)
    text = str(caught.value)
    position = int(np.flatnonzero(np.random.default_rng(0).permutation(N) == BAD)[0])
    assert f"in batch {position // BATCH + 1} of 3; --on-error skip leaves such" in text
    assert f"It is image {BAD} in" in text


@pytest.mark.parametrize("measurement", [cka, skip_ratio, attention_distance])
def test_a_skipped_batch_leaves_nothing_behind(measurement, images, model, capsys):
    result = measurement.measure(model, images, batch_size=BATCH, on_error="skip")
    assert result.meta["n"] == N - BATCH
    assert len(result.meta["images"]["skipped"]) == BATCH
    assert "Skipped batch" in capsys.readouterr().err
    assert f"{BATCH} left out for values not finite" in result._caption()
    # The other two batches alone, in their order.
    order = np.random.default_rng(0).permutation(N)
    kept = [position for position in order if position not in bad_batch()]
    back = np.argsort(np.random.default_rng(0).permutation(len(kept)))
    alone = measurement.measure(model, images[np.array(kept)[back]], batch_size=BATCH)
    for name, array in alone.arrays().items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(result.arrays()[name], array, rtol=1e-6, atol=1e-9)


def test_gradients_too(images, model):
    result = receptive_field.measure(
        model, images, num_images=N, batch_size=BATCH, channels=1, layers="blocks.1",
        on_error="skip",
    )  # fmt: skip
    assert result.meta["n"] == N - BATCH and np.isfinite(result.gradient).all()


def test_a_check_that_fails_for_one_image(images, model, monkeypatch):
    images = images.nan_to_num(3.0)
    real = observer.suspects

    def suspects(own, out, *rest):
        # As if the fused kernel had gone wrong on this image.
        out = out.clone()
        out[model.module.seen == images[BAD].sum()] += 1
        return real(own, out, *rest)

    def see(module, given):
        module.seen = given[0].sum((1, 2, 3))

    handle = model.module.register_forward_pre_hook(see)
    monkeypatch.setattr(observer, "suspects", suspects)
    monkeypatch.setattr(observer, "decide", lambda *_: (1.0, 0.1))
    with pytest.raises(VitprobeError, match=rf"does not give what .* image {BAD} in batch"):
        attention_distance.measure(model, images, batch_size=BATCH)
    result = attention_distance.measure(model, images, batch_size=BATCH, on_error="skip")
    assert result.meta["n"] == N - BATCH
    handle.remove()


def test_nothing_left_is_an_error(images, model):
    with pytest.raises(VitprobeError, match="No batch of at least"):
        cka.measure(model, torch.full_like(images, torch.nan), batch_size=BATCH, on_error="skip")
    with pytest.raises(VitprobeError, match="--on-error must be stop or skip, not 'go'"):
        cka.measure(model, images, on_error="go")


def test_the_command(images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.full((32, 32, 3), 20 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    code = skip_ratio.main(
        ["--models", "test_vit@random", "--images", str(folder), "--out", str(tmp_path / "out"),
         "--on-error", "skip", "--quiet"]
    )  # fmt: skip
    assert code == 0 and "skip_ratio" in capsys.readouterr().out


# sys.exit() in the user's code


class Exits(torch.nn.Module):
    """sys.exit() in a forward pass, from a number of images on."""

    def __init__(self, most):
        super().__init__()
        self.stem, self.head, self.most = (
            torch.nn.Conv2d(3, 8, 8, 8),
            torch.nn.Conv2d(8, 4, 1),
            most,
        )

    def forward(self, x):
        x = self.stem(x).relu()
        if len(x) > self.most:
            sys.exit(5)
        return self.head(x)


@pytest.mark.parametrize("most", [0, 3], ids=["always", "in the loop"])
def test_a_forward_pass_that_would_end_the_run_is_told_as_the_models(most):
    pixels = torch.randn(N, 3, 32, 32)
    with pytest.raises(VitprobeError, match=r"^own cannot run on images of .*: SystemExit: 5"):
        cka.measure(wrap(Exits(most), "own"), pixels, batch_size=BATCH)


@pytest.mark.parametrize(
    "code", ["import sys\nsys.exit(6)", "def build():\n    raise SystemExit(6)"]
)
def test_a_file_that_would_end_the_run_is_told(code, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(VitprobeError, match=r"mine\.py:build: SystemExit: 6"):
        load_model(f"{tmp_path / 'mine.py'}:build")


def test_a_signal_handler_that_ends_the_program_does_end_it():
    class Sends(Exits):
        def forward(self, x):
            if len(x) > 3:
                signal.raise_signal(signal.SIGTERM)
            return super().forward(x)

    def handler(number, frame):
        sys.exit(9)

    signal.signal(signal.SIGTERM, handler)
    with pytest.raises(SystemExit, match="9"):
        cka.measure(wrap(Sends(9), "own"), torch.randn(N, 3, 32, 32), batch_size=BATCH)
