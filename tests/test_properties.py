"""Properties that hold for all inputs, and a fuzz that never sees a traceback."""

import math
import os
import string

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from vitprobe import VitprobeError, cka, load_result, open_images, redraw
from vitprobe.cli import slug
from vitprobe.images.decoding import rgb
from vitprobe.results.result import FAILS, HOLDS, decide
from vitprobe.running.checkpoint import Checkpoint
from vitprobe.running.memory import Forecast
from vitprobe.statistics.hsic import gram, hsic, normalise, u_centre
from vitprobe.statistics.moments import add_moments, mean_and_error, moment_shapes

quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.floats(-1e3, 1e3, width=32)


def features(least=4, most=9):
    shape = st.tuples(st.integers(least, most), st.integers(1, 6))
    return shape.flatmap(lambda s: hnp.arrays(np.float64, s, elements=numbers)).map(
        torch.from_numpy
    )


# The arithmetic


@quick
@given(features())
def test_u_centred_grams_have_rows_that_sum_to_zero_and_forget_shifts(x):
    centred = u_centre(gram(x)[None])[0]
    size = float(gram(x).abs().max()) + 1
    assert float(centred.sum(0).abs().max()) <= 1e-9 * size
    assert torch.equal(centred.diagonal(), torch.zeros(len(x), dtype=torch.float64))
    shifted = u_centre(gram(x + 7.0)[None])[0]
    assert float((centred - shifted).abs().max()) <= 1e-9 * size * len(x)


@quick
@given(features(), st.floats(0.01, 100), st.randoms(use_true_random=False))
def test_cka_is_symmetric_one_with_itself_and_blind_to_scale_and_order(x, scale, chance):
    y = x.square() - x
    order = list(range(len(x)))
    chance.shuffle(order)
    grams, shuffled = (
        torch.stack([gram(x[rows]), gram(y[rows]), gram(scale * x[rows])])
        for rows in (list(range(len(x))), order)
    )
    own = hsic(grams).diagonal()
    # Where one image alone differs HSIC is 0, and what is left of it rounding.
    if bool((own <= 1e-9 * grams.diagonal(dim1=1, dim2=2).sum(1).square()).any()):
        return
    value = normalise(hsic(grams))
    assert torch.equal(value, value.mT) and bool((value.abs() <= 1 + 1e-9).all())
    assert torch.allclose(value, normalise(hsic(shuffled)), atol=1e-6)
    assert math.isclose(float(value[0, 2]), 1, abs_tol=1e-6)


@quick
@given(hnp.arrays(np.float64, st.tuples(st.integers(2, 12), st.just(3)), elements=numbers),
       st.integers(1, 11))  # fmt: skip
def test_means_do_not_depend_on_how_images_fall_into_batches(values, cut):
    def sums(*parts):
        made = {k: torch.zeros(tuple(s), dtype=torch.float64)
                for k, s in moment_shapes(a=(3,)).items()}  # fmt: skip
        for part in parts:
            if len(part):
                add_moments(made, "a", (), torch.from_numpy(part))
        return mean_and_error(made, "a")

    whole, split = sums(values), sums(values[:cut], values[cut:])
    np.testing.assert_allclose(whole, split, atol=1e-3, rtol=1e-9)
    np.testing.assert_allclose(whole[0], values.mean(0), atol=1e-9 * (1 + np.abs(values).max()))


@quick
@given(st.floats(allow_nan=True), st.floats(0, 10), st.floats(-10, 10))
def test_a_verdict_is_never_given_within_two_standard_errors(value, error, threshold):
    verdict = decide(value, error, threshold)
    if verdict == HOLDS:
        assert value - 2 * error > threshold
    elif verdict == FAILS:
        assert value + 2 * error < threshold


@quick
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**42), st.integers(1, 4096))
def test_the_batch_size_to_try_fits(activations, own, free, batch_size):
    told = Forecast(0, activations, own).warning(free, batch_size)
    assert (told is None) == (activations + own <= free)
    if told and "--batch-size" in told:
        smaller = int(told.rpartition(" ")[2].rstrip("."))
        assert 1 <= smaller < batch_size
        assert smaller * activations / batch_size + own <= free * (1 + 1e-9)


# States and names


@quick
@given(st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=5), st.data())
def test_states_in_any_combination_count_no_batch_twice(tmp_path_factory, shares, data):
    folder = tmp_path_factory.mktemp("states")
    for rank, share in enumerate(shares):
        done = np.isin(np.arange(12), list(share))
        total = torch.tensor(float(sum(2**b for b in share)), dtype=torch.float64)
        Checkpoint(folder / "s", {}, 12, rank).save({"total": total}, done)
    torn = data.draw(st.sets(st.integers(0, len(shares) - 1)))
    for rank in torn:
        file = next(folder.glob(f"*.{rank}.partial"))
        file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, 200))])
    for _ in range(2):
        state = {"total": torch.zeros((), dtype=torch.float64)}
        done = Checkpoint(folder / "s", {}, 12, 0).load(state)
        # Every batch is a digit of its own in the sum.
        assert int(state["total"]) == sum(2**b for b in np.flatnonzero(done))
    whole = [share for rank, share in enumerate(shares) if rank not in torn]
    assert done.sum() >= max(map(len, whole), default=0)


@quick
@given(st.text(max_size=300))
def test_a_models_name_becomes_a_file_name(spec):
    name = slug(spec)
    assert "/" not in name and "\0" not in name and len(name) <= 60


@quick
@given(hnp.arrays(np.float32, (5, 7)))
def test_any_floats_become_a_picture(values):
    assert rgb(Image.fromarray(values)).size == (7, 5)


# Command lines and files

flags = ["--models", "--images", "--num-images", "--batch-size", "--image-size", "--layers",
         "--device", "--precision", "--seed", "--workers", "--save-every", "--stem",
         "--format", "--pairwise", "--fresh", "--quiet", "--nonsense"]  # fmt: skip
words = st.one_of(
    st.sampled_from(["0", "-1", "3", "1e9", "nan", "inf", str(2**70), "auto", "cuda:99", "meta",
                     "cpu", "blocks", "all", "*", "[", "test_vit@random", "@", "@random",
                     "test_vit@/dev/null", "vit_b16@", "hf-hub:", "png", "bf16", "..", ".", "/",
                     "/dev/null", "wds/x", "torch/none", "\udcff", "ä $x$", "a" * 300]),
    st.text(string.printable, max_size=8),
)  # fmt: skip


@settings(quick, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(flags), st.lists(words, max_size=2)), max_size=3))
def test_no_command_line_ends_in_a_traceback(tmp_path_factory, changes):
    """A small run with up to three options changed: it works or says one line and exits with 2."""
    out = tmp_path_factory.mktemp("out")
    images = out / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    arguments = ["--models", "vit_gap_box@random", "--images", str(images), "--workers", "0"]
    arguments += [word for flag, given_ in changes for word in (flag, *given_)]
    try:
        # Where to is not fuzzed: nothing is to be written elsewhere.
        status = cka.main([*arguments, "--out", str(out / "out")])
    except SystemExit as stop:
        status = stop.code
    assert status in (0, 2)
    assert {path.name for path in out.iterdir()} <= {"images.npy", "out"}
    left = os.listdir(out / "out") if (out / "out").exists() else []
    assert status == 0 or not left


@settings(quick, max_examples=12)
@given(st.binary(max_size=300), st.sampled_from(["npz", "npy", "tar", "pth", "safetensors", "png"]))
def test_no_file_ends_in_a_traceback(tmp_path_factory, content, suffix):
    folder = tmp_path_factory.mktemp("files")
    head = {
        "npz": b"PK\x03\x04",
        "npy": b"\x93NUMPY\x01\x00",
        "tar": b"a.png\0",
        "pth": b"\x80\x02",
        "safetensors": b"\x20\0\0\0\0\0\0\0{",
        "png": b"\x89PNG\r\n\x1a\n",
    }
    for start in (b"", head[suffix]):
        path = folder / f"x.{suffix}"
        path.write_bytes(start + content)
        for use in (open_images, load_result, lambda p: load_result(p).plot()):
            try:
                use(path)
            except VitprobeError as error:
                assert "\n" not in str(error)
        status = cka.main(["--models", f"vit_gap_box@{path}", "--out", str(folder / "out")])
        assert status == 2
        assert redraw.main([str(path)]) == 2
