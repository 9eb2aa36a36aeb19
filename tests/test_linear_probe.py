"""Linear probes: scikit-learn's numbers, leave-one-out, what test images may touch, messages."""

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge, RidgeCV
from torch import nn

from vitprobe import linear_probe
from vitprobe.errors import VitprobeError
from vitprobe.images.labelled import open_task
from vitprobe.images.sources import open_images
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.running import probes as core_probes
from vitprobe.running.interrupts import Interrupted
from vitprobe.running.probes import Probe, fit_probe, side_by_side
from vitprobe.statistics.ridge import (
    PENALTIES,
    dual,
    dual_errors,
    primal_errors,
    ridge,
    signed_targets,
)
from vitprobe.tracing.places import CLASS_TOKEN, CONVOLUTION, MEAN_OF_TOKENS


def problem(n, d, classes=3, seed=0, count=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, count, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, count, d, generator=generator, dtype=torch.float64)
    return centres[labels] + noise + 5, labels


def centred(features):
    return features - features.mean(0)


def with_constant(rows):
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


@pytest.mark.parametrize("n, d", [(40, 7), (12, 60), (30, 29)])
def test_weights_are_those_of_scikit_learn(n, d):
    features, labels = problem(n, d)
    rows, targets = with_constant(centred(features[:, 0])), signed_targets(labels, 3)
    for penalty in (0.01, 1.0, 300.0):
        found, _ = ridge(rows, targets, torch.tensor([penalty]))
        known = Ridge(alpha=penalty, fit_intercept=False).fit(rows, targets)
        np.testing.assert_allclose(rows @ found, known.predict(rows), atol=1e-6)
    found, chosen = ridge(rows, targets)
    assert chosen == pytest.approx(penalty_of_scikit_learn(rows[:, :-1], targets))
    known = Ridge(alpha=float(chosen), fit_intercept=False).fit(rows, targets)
    np.testing.assert_allclose(rows @ found, known.predict(rows), atol=1e-6)


def penalty_of_scikit_learn(features, targets):
    """That of the least leave-one-out error, for which it centres anew without the row."""
    return RidgeCV(alphas=PENALTIES.numpy()).fit(features, targets).alpha_


@pytest.mark.parametrize("n, d", [(40, 7), (12, 60), (20, 20)])
def test_primal_equals_dual(n, d):
    features, labels = problem(n, d, count=4)
    rows = with_constant(centred(features)).transpose(0, 1)
    targets = signed_targets(labels, 3)
    primal, first = ridge(rows, targets, form="primal")
    other, second = ridge(rows, targets, form="dual")
    torch.testing.assert_close(primal, other, rtol=1e-6, atol=1e-8)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("n, d", [(15, 4), (9, 30)])
def test_leave_one_out_equals_brute_force(n, d):
    features, labels = problem(n, d)
    features, targets = centred(features[:, 0]), signed_targets(labels, 3)
    rows = with_constant(features)
    penalties = torch.tensor([0.1, 5.0, 200.0], dtype=torch.float64)
    brute = []
    for penalty in penalties.tolist():
        errors = []
        for i in range(n):
            rest = np.arange(n) != i
            # The mean of the others, a constant of their own.
            left = Ridge(alpha=penalty).fit(features[rest], targets[rest])
            errors.append((targets[i].numpy() - left.predict(features[i : i + 1])[0]) ** 2)
        brute.append(float(np.mean(errors)))
    moment = rows.mT @ rows
    assert primal_errors(rows, moment, targets, penalties).tolist() == pytest.approx(brute)
    assert dual_errors(rows @ rows.mT, targets, penalties).tolist() == pytest.approx(brute)
    assert float(dual(rows @ rows.mT, targets, penalties)[1]) == float(
        penalties[int(np.argmin(brute))]
    )


@pytest.mark.parametrize("n, d", [(24, 6), (9, 20)])
def test_probes_of_a_layer_classify_as_scikit_learn_does(n, d, monkeypatch):
    features, labels = problem(n, d, count=5)
    others, truth = problem(50, d, count=5, seed=1)
    monkeypatch.setattr(core_probes, "SOLVED_BYTES", 2)  # one vector after the other
    probe = fit_probe(features, labels, 3)
    mean, scale = features.mean(0), features.std(0, correction=0) + 1e-5
    for v in [*range(5), None]:
        # The last vector is the mean of places: no part of what all of them make.
        part = slice(0, 4) if v is None else slice(v, v + 1)
        rows, tests = (
            with_constant(((x - mean) / scale)[:, part].flatten(1)) for x in (features, others)
        )
        targets = signed_targets(labels, 3)
        penalty = penalty_of_scikit_learn(rows[:, :-1], targets)
        assert probe.penalty[0, 5 if v is None else v] == pytest.approx(penalty)
        known = Ridge(alpha=penalty, fit_intercept=False).fit(rows, targets)
        scores = torch.einsum("nvd,vdc->nvc", others - probe.centre, probe.weights[
            :, :, int(v is None), 0
        ])  # fmt: skip
        scores = scores.sum(1) + probe.joint_bias if v is None else scores[:, v] + probe.bias[v]
        np.testing.assert_allclose(scores, known.predict(tests), atol=1e-6)
        right = (known.predict(tests).argmax(1) == truth.numpy()).sum()
        assert probe.correct(others, truth)[0, 5 if v is None else v] == right


def test_leave_one_out_sees_that_a_good_fit_is_better_than_none():
    # With the image that is left out in the mean, all others together are its negative: a fit of
    # classes far apart had 1.5 to 2 times the error of none, and the largest penalties won.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 10
    centres = torch.randn(10, 384, generator=generator, dtype=torch.float64)
    features = centres[labels] + torch.randn(100, 384, generator=generator, dtype=torch.float64)
    rows = with_constant(centred(features))
    errors = dual_errors(rows @ rows.mT, signed_targets(labels, 10), PENALTIES)
    assert errors[:4].max() < 0.1 * errors[-1]


@pytest.fixture
def threads():
    """Gives torch a number of threads; what it was comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n, d", [(24, 6), (9, 20)])
def test_threads_share_the_vectors_out_and_change_nothing(n, d, monkeypatch, threads):
    monkeypatch.setattr(core_probes, "PIECE_BYTES", 2)  # one vector after the other
    found = []
    for count in (1, 3):
        threads(count)
        found.append(fit_probe(*problem(n, d, count=5), 3))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == count
        assert torch.get_num_threads() == count
    for name in ("centre", "weights", "bias", "joint_bias", "penalty"):
        alone, shared = (getattr(one, name) for one in found)
        torch.testing.assert_close(alone, shared, rtol=1e-9, atol=1e-12)


def test_draws_side_by_side_count_as_each_does_alone():
    drawn = [fit_probe(*problem(12, 8, seed=s, count=3), 3) for s in (0, 1)]
    others, truth = problem(40, 8, count=3, seed=2)
    together = side_by_side(drawn).correct(others, truth)
    assert together.tolist() == [one.correct(others, truth)[0].tolist() for one in drawn]


class Words(nn.Module):
    """A class token and four patches; some carry the class, as told."""

    def __init__(self, class_in="cls"):
        super().__init__()
        self.register_buffer("corner", torch.zeros(4, 4))
        self.corner[0, 0] = 1
        self.out = nn.Identity()
        self.class_in = class_in

    def forward(self, x):
        # What the label is about, and what it is not: sums over the image, which stand nowhere.
        signal = (x * self.corner).sum((2, 3))[:, None]
        other = (x * (1 - self.corner)).sum((2, 3))[:, None]
        noise = x[:, :, 1:3, 1:3].flatten(2).mT
        if self.class_in == "cls":
            return self.out(torch.cat([signal, noise], 1) * 2)
        third = torch.arange(4)[:, None] == 2
        return self.out(torch.cat([other, torch.where(third, signal, noise)], 1) * 2)


@pytest.fixture
def labelled():
    """Images whose corner pixel tells one of three classes, in the form of ``Images``."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(240, 3, 4, 4, generator=generator)
    labels = np.arange(240) % 3
    pixels[:, :, 0, 0] = 8 * torch.eye(3)[labels] + 0.1 * pixels[:, :, 0, 0]
    return replace(open_images(pixels), labels=labels, classes=("a", "b", "c"))


def test_the_readout_that_holds_the_class_finds_it(labelled):
    result = linear_probe.measure(
        [Words("cls"), Words("third")], labelled, layers="out", shots=8, draws=3
    )
    names = result.readouts.tolist()
    first, second = (dict(zip(names, row)) for row in result.accuracy)
    assert first["CLS"] == 1
    assert first["tokens"] < 0.6
    assert second["CLS"] < 0.6
    np.testing.assert_allclose(result.place_accuracy[1], [[0.33, 0.33], [1, 0.33]], atol=0.15)
    assert second["tokens"] == pytest.approx(result.place_accuracy[1].mean())
    assert result.accuracy_of_draw.shape == (3, 2, 5)
    assert result.meta["n"] == 240 - 3 * 3 * 8
    assert "split of a tensor by seed 0" in result._caption()


def test_shuffled_labels_give_chance(labelled):
    shuffled = np.random.default_rng(1).permutation(labelled.labels)
    labelled = replace(labelled, labels=shuffled)
    result = linear_probe.measure(Words("cls"), labelled, layers="out", shots=8, draws=5)
    assert np.nanmax(np.abs(result.accuracy - 1 / 3)) < 0.12


def test_test_images_touch_neither_penalty_nor_mean_nor_deviation(labelled, monkeypatch):
    fitted = []

    def kept(*arguments):
        fitted.append(fit_probe(*arguments))
        return fitted[-1]

    monkeypatch.setattr(core_probes, "fit_probe", kept)
    task = labelled.choose(np.arange(60))
    for tests in (labelled.choose(np.arange(60, 120)), labelled.choose(np.arange(120, 125))):
        strange = replace(tests, items=type(tests.items)(tests.items.tensor * 100 - 7))
        linear_probe.measure(Words(), task, test_images=strange, layers="out", shots=5, draws=1)
    one, other = fitted
    for name in ("centre", "weights", "bias", "joint_bias", "penalty"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_no_image_is_in_two_draws_or_in_a_draw_and_the_test(labelled):
    task = open_task(labelled, None, shots=5, draws=4, num_test=50, seed=3)
    used = [set(images.order.tolist()) for images in (*task.draws, task.test)]
    assert sum(map(len, used)) == len(set.union(*used)) == 4 * 15 + 50
    for draw in task.draws:
        assert np.bincount(draw.chosen_labels()).tolist() == [5, 5, 5]
    again = open_task(labelled, None, shots=5, draws=4, num_test=50, seed=3)
    assert [draw.digest for draw in again.draws] == [draw.digest for draw in task.draws]


def test_the_bundled_scenes_keep_their_splits():
    task = open_task(None, None, shots=3, draws=2, num_test=40, seed=0)
    assert [len(draw) for draw in task.draws] == [30, 30]
    assert len(task.test) == 40
    assert task.draws[0].source == "digit scenes (fit)"
    assert task.test.source == "digit scenes (test)"


def test_layers_in_turns_and_all_at_once_give_the_same(monkeypatch):
    arguments = {"num_images": 20, "shots": 2, "draws": 1}
    whole = linear_probe.measure("test_vit@random", **arguments)
    monkeypatch.setattr(core_probes, "HELD_BYTES", 1)
    np.testing.assert_array_equal(
        linear_probe.measure("test_vit@random", **arguments).accuracy, whole.accuracy
    )


def test_maps_come_down_to_the_last_grid():
    result = linear_probe.measure("test_resnet@random", num_images=20, shots=2, draws=1)
    assert result.place_accuracy.shape == (len(result.layers), 5, 5)
    assert np.isfinite(result.place_accuracy).all()
    cls = result.readouts.tolist().index("CLS")
    assert np.isnan(result.accuracy[:, cls]).all()
    assert np.isfinite(np.delete(result.accuracy, cls, 1)).all()
    assert np.isnan(result.accuracy_se).all()  # one draw tells no spread


def made(kinds, values):
    """A result of two draws from accuracies (models, layers, readouts)."""
    values = np.array(values, float)
    models, depth, readouts = values.shape
    flat = values.reshape(-1, readouts)
    return linear_probe.LinearProbeResult(
        {"models": [{"name": f"m{i}"} for i in range(models)], "kinds": kinds, "n": 10_000},
        accuracy=flat,
        accuracy_se=np.full(flat.shape, 0.01),
        layers=np.array(["block"] * models * depth),
        readouts=np.array(core_probes.READOUTS),
        model_of_layer=np.repeat(np.arange(models), depth),
        depth=np.tile(np.linspace(0, 1, depth), models),
        accuracy_of_draw=np.stack([flat - 0.01, flat + 0.01]),
        place_accuracy=np.zeros((models * depth, 1, 1)),
        penalty=np.ones(flat.shape),
    )


def test_findings_follow_the_numbers():
    # tokens, CLS, first patch, mean, all
    by_class = [[0.2, 0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.3, 0.4, 0.5], [0.4, 0.9, 0.4, 0.7, 0.9]]
    by_mean = [[0.2, np.nan, 0.2, 0.3, 0.4]] * 2 + [[0.8, np.nan, 0.8, 0.9, 0.9]]
    cnn = [[0.2, np.nan, 0.2, 0.3, 0.4]] * 2 + [[0.8, np.nan, 0.8, 0.6, 0.9]]
    result = made([CLASS_TOKEN, MEAN_OF_TOKENS, CONVOLUTION], [by_class, by_mean, cnn])
    found = {one.claim: one.verdict for one in result.findings()}
    assert list(found.values()) == [HOLDS, HOLDS, HOLDS, HOLDS, FAILS]
    assert next(iter(found)).endswith("far better in m1 than in m0")


def test_an_interrupted_test_pass_goes_on_from_its_state(labelled, tmp_path, monkeypatch):
    arguments = {"layers": "out", "shots": 4, "draws": 2, "batch_size": 64}
    whole = linear_probe.measure(Words(), labelled, **arguments)
    correct, calls = Probe.correct, []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return correct(*given)

    monkeypatch.setattr(Probe, "correct", stopping)
    arguments["checkpoint"] = tmp_path / "state"
    with pytest.raises(Interrupted, match="after batch 2 of 4"):
        linear_probe.measure(Words(), labelled, **arguments)
    result = linear_probe.measure(Words(), labelled, **arguments)
    assert len(calls) == 2 + 2
    np.testing.assert_array_equal(result.accuracy, whole.accuracy)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_probed_is_refused(labelled, tmp_path):
    bare = replace(labelled, labels=None)
    with pytest.raises(VitprobeError, match="has no labels"):
        linear_probe.measure(Words(), bare)
    with pytest.raises(
        VitprobeError, match=r"--shots: .* has 40 images of the class 'a' to fit on, not 50"
    ):
        linear_probe.measure(Words(), labelled, shots=50)
    other = replace(labelled, classes=("a", "b", "d"), digest="of others")
    with pytest.raises(VitprobeError, match="'d' of the test images"):
        linear_probe.measure(Words(), labelled, test_images=other)
    with pytest.raises(VitprobeError, match="the same images"):
        linear_probe.measure(Words(), labelled, test_images=labelled)
    with pytest.raises(VitprobeError, match="needs --images"):
        linear_probe.measure(Words(), test_images=labelled)
    with pytest.raises(VitprobeError, match="at least 1"):
        linear_probe.measure(Words(), labelled, shots=0)
    labelled.items.tensor[:, 0, 0, 0] = torch.nan
    with pytest.raises(VitprobeError, match="layer out of Words is not finite"):
        linear_probe.measure(Words(), labelled, layers="out")


def test_the_command_runs_on_class_folders_and_draws_what_it_saves(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for part, count in (("fit", 6), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    arguments = ["--models", "test_vit@random", "--images", str(tmp_path / "fit"), "--test-images",
                 str(tmp_path / "test"), "--shots", "2", "--draws", "3"]  # fmt: skip
    assert linear_probe.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    result = load_result(tmp_path / "out" / "linear_probe-test_vit-random.npz")
    assert result.meta["n"] == 8
    assert result.meta["classes"] == ["cat", "dog"]
    ax = result.plot().axes[0]
    drawn = [line.get_ydata() for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(drawn[1], result.accuracy[:, 1])
    assert "CLS" in [text.get_text() for text in ax.get_legend().texts]
    assert len(list((tmp_path / "out").iterdir())) == 2
