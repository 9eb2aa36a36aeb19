"""All measurements in one pass: the numbers of each alone, whatever happens in between."""

import signal
from collections import Counter

import numpy as np
import pytest
import timm
import torch

from vitprobe import cka, measure_all, skip_ratio
from vitprobe.catalogue import measurements
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.running import passes
from vitprobe.running.interrupts import Interrupted
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_each, measure_one
from vitprobe.together import measurement_class

N, OPTIONS = 15, {"batch_size": 5, "device": "cpu"}
# Those that look at other images, at none, or make passes with gradients.
ALONE = {"linear_probe", "receptive_field", "position_embedding", "patch_embedding"}
JOINT = [name for name in measurements() if name not in ALONE]


class Counting(torch.nn.Module):
    """Counts its passes on whole batches."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, x):
        self.passes += len(x) == OPTIONS["batch_size"]
        return self.inner(x)


def models():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=32, num_classes=4)
    cnn = timm.create_model("test_resnet", num_classes=4)
    torch.nn.init.normal_(vit.pos_embed)
    return [wrap(vit.eval(), "vit"), wrap(cnn.eval(), "cnn")]


@pytest.fixture(scope="module")
def images():
    return torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def together(images):
    return measure_all(JOINT, models(), images, **OPTIONS)


def check_same(one, other, rtol=1e-9):
    for name, array in one.arrays().items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(other.arrays()[name], array, rtol=rtol, atol=1e-12)
        else:
            np.testing.assert_array_equal(other.arrays()[name], array)
    assert one.findings() == other.findings()


@pytest.mark.parametrize("name", JOINT)
def test_each_has_the_numbers_that_it_has_alone(together, images, name):
    found = together[name]
    mine = [model for model in models() if model.name in found.models]
    measurement = measurement_class(name)(first=4 if name == "attention_rollout" else None)
    alone = measure_one(measurement, mine, images, Options(**OPTIONS))
    if name == "attention_rollout":
        assert found.meta["n"] == 4
        alone = measure_each({name: measurement}, mine, images, Options(**OPTIONS))[name]
    check_same(alone, found)
    missing = {"cnn"} - set(found.models)
    assert set(found.meta.get("without", {})) == missing


def test_the_networks_run_once_whatever_is_measured(images):
    def counted(names):
        net = Counting(timm.create_model("test_vit", img_size=32).eval())
        measure_all(names, wrap(net, "net"), images, **OPTIONS)
        return net.passes

    one = counted(["cka"])
    assert one >= N / OPTIONS["batch_size"]
    assert counted(["cka", "attention_distance", "skip_ratio", "localization"]) == one


def test_grams_are_formed_once(images, monkeypatch):
    from vitprobe.running import session

    formed, real = Counter(), session.gram

    def gram(tensor):
        formed[len(tensor)] += 1
        return real(tensor)

    monkeypatch.setattr(session, "gram", gram)
    measure_all(["cka"], models(), images, layers="paper", **OPTIONS)
    once = formed.total()
    formed.clear()
    measure_all(["cka", "skip_ablation"], models(), images, layers="paper", **OPTIONS)
    assert formed.total() == once > 0


def test_attention_is_recomputed_once_for_all_who_watch_it(images, monkeypatch):
    from vitprobe.tracing import attention

    blocks, real = [], attention._Observer._blocks

    def counted(self, layer, operation):
        blocks.append(layer.label)
        return real(self, layer, operation)

    monkeypatch.setattr(attention._Observer, "_blocks", counted)
    measure_all(["attention_distance"], models()[:1], images, **OPTIONS)
    once = len(blocks)
    blocks.clear()
    measure_all(["attention_distance", "attention_rollout"], models()[:1], images, **OPTIONS)
    assert len(blocks) == once > 0


def test_a_stopped_joint_run_resumes(together, images, tmp_path, monkeypatch):
    real, calls = skip_ratio._Watch.end, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        real(*args)

    monkeypatch.setattr(skip_ratio._Watch, "end", stops)
    options = {**OPTIONS, "checkpoint": tmp_path / "state"}
    with pytest.raises(Interrupted, match="Stopped after batch 2 of 3"):
        measure_all(JOINT, models(), images, **options)
    resumed = measure_all(JOINT, models(), images, **options)
    assert len(calls) == 3
    for name, result in together.items():
        check_same(result, resumed[name])


def test_what_a_model_cannot_have_is_said_and_made_for_the_others(images):
    found = measure_all(["cka", "attention_distance", "position_embedding"], models()[1], images,
                        **OPTIONS)  # fmt: skip
    assert list(found) == ["cka"]
    assert "no attention" in found.missing["attention_distance"]
    assert "no position embedding" in found.missing["position_embedding"]


def test_one_that_fails_leaves_the_others(images, monkeypatch):
    def fails(self, batch):
        raise VitprobeError("it broke")

    monkeypatch.setattr(skip_ratio._Watch, "end", fails)
    made = {name: measurement_class(name)() for name in ("cka", "skip_ratio")}
    with pytest.raises(VitprobeError, match="it broke"):
        measure_each(made, models(), images, Options(**OPTIONS))
    found = measure_each(made, models(), images, Options(**OPTIONS), go_on=True)
    assert list(found) == ["cka"] and found.failed == {"skip_ratio": "it broke"}
    check_same(cka.measure(models(), images, **OPTIONS), found["cka"])


def test_pairs_of_models_have_results_of_their_own(images):
    vit, cnn = models()
    second = wrap(timm.create_model("test_vit", img_size=32).eval(), "other")
    found = measure_all(["head_subsets"], [vit, second, cnn], images, **OPTIONS)
    assert list(found) == ["head_subsets: vit, cnn", "head_subsets: other, cnn"]


def test_small_batches_are_left_out_of_those_that_they_are_too_small_for(images):
    # Three images are a batch of their own where even ones were too small for CKA.
    found = measure_all(["cka", "attention_distance"], models(), images[:7], batch_size=4,
                        device="cpu")  # fmt: skip
    assert found["cka"].meta["n"] == 4 and found["cka"].meta["left_out"] == 3
    assert found["attention_distance"].meta["n"] == 7


def test_wrong_names_and_options_are_one_line(images):
    with pytest.raises(VitprobeError, match=r"No such measurement: 'ckaa'.* cka"):
        measure_all(["ckaa"], models(), images)
    with pytest.raises(VitprobeError, match=r"no option 'layer'.* layers"):
        measure_all(["cka"], models(), images, layer="blocks")
    assert passes.Results().missing == {}


def test_batches_are_those_of_the_most_demanding():
    """CKA needs four images in each; even batches of nine would have three."""
    model = wrap(timm.create_model("test_vit", img_size=32).eval(), "net")
    found = measure_all(["skip_ratio", "cka"], model, torch.randn(9, 3, 32, 32), batch_size=4)
    assert found["cka"].meta["n"] == 8 and found["skip_ratio"].meta["n"] == 9
