"""Rules of one line each, by values worked out by hand: what larger tests let through."""

import importlib.util
import os
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Stub

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from vitprobe import attention_distance, head_subsets
from vitprobe.attention_distance import AttentionDistance
from vitprobe.cka import CKA
from vitprobe.errors import VitprobeError
from vitprobe.images.labelled import open_task
from vitprobe.images.sources import open_images
from vitprobe.models.foreign import rename
from vitprobe.models.loading import load_models
from vitprobe.papers import dosovitskiy2021
from vitprobe.papers.raghu2021 import alike
from vitprobe.position_embedding import PositionEmbeddingResult
from vitprobe.report.command import Report
from vitprobe.report.grid import tally
from vitprobe.results import tables
from vitprobe.results.drawing import render
from vitprobe.results.result import FAILS, HOLDS, Finding, plain
from vitprobe.results.writing import write_atomically
from vitprobe.running import interrupts, loop, memory
from vitprobe.running.devices import prepared
from vitprobe.running.probes import count_right
from vitprobe.statistics.hsic import MAX_GROUPS
from vitprobe.tracing.attention_operations import joined
from vitprobe.tracing.branches import CONVOLUTION, MLP, branch_kind
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import map_layers

ANALYSES = Path(__file__).parent.parent / "analyses"


def test_the_penalty_of_several_draws_is_their_geometric_mean():
    placed = [Stub(places=Stub(has_class=False))]
    probes = [Stub(penalty=torch.tensor([[1.0] * 3, [100.0] * 3]))]
    sums = {"right0": torch.ones(2, 3), "tested": torch.tensor(2.0)}
    penalty = count_right(placed, [(1, 1)], probes, sums).penalty
    np.testing.assert_allclose(penalty, [[10, np.nan, 10, 10, 10]])


def test_the_last_layer_has_depth_one():
    cross = torch.zeros(5, 4)
    cross[-1] = 1
    assert alike._best_match_depth(cross) == 1


def test_the_late_gap_is_the_least_of_the_layers():
    cross = torch.tensor([[0.6, 0.9], [0.6, 0.9], [0.5, 0.4]])
    assert alike._late_gap(cross).item() == pytest.approx(0.1)


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.skips = False

    def forward(self, x):
        x = self.first(x)
        return x if self.skips else self.second(x)


def test_a_layer_that_a_later_pass_skips_is_missed():
    net, x = Skipping().eval(), torch.randn(2, 3, 8, 8)
    layers = map_layers("net", net, x).choose("all")
    with capture(net, layers, lambda i, tensor: None):
        net(x)
        net.skips = True
        with pytest.raises(VitprobeError, match="did not run"):
            net(x)


def test_a_row_that_is_all_masked_out_attends_to_nothing():
    mask = torch.tensor([[True, False], [False, False]])
    found = joined(torch.randn(1, 2, 3), torch.randn(1, 2, 3), mask, 1.0)
    assert found.tolist() == [[[1, 0], [0, 0]]]


@pytest.mark.parametrize(("broken", "stops"), [(0, False), (1, False), (2, True)])
def test_one_image_of_a_hundred_may_be_broken(broken, stops):
    state = {"_broken": torch.zeros(100)}
    state["_broken"][:broken] = 1
    ready = Stub(images=open_images(torch.zeros(100, 3, 2, 2)))
    if stops:
        with pytest.raises(VitprobeError, match="2 of 100"):
            loop._check_broken(ready, state)
    else:
        loop._check_broken(ready, state)


@pytest.mark.skipif(os.name != "posix", reason="modes and open files are POSIX's")
def test_a_file_is_replaced_whole_and_as_readable_as_others(tmp_path):
    file = tmp_path / "r.npz"
    file.write_bytes(b"before")
    mask = os.umask(0o022)
    try:
        with file.open("rb") as reader:
            write_atomically({file: b"afterwards"})
            assert reader.read() == b"before"
    finally:
        os.umask(mask)
    assert file.read_bytes() == b"afterwards"
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_second_signal_at_once_leaves_the_batch_whole(monkeypatch):
    """torchrun's processes get Ctrl-C from the terminal and SIGTERM from torchrun."""
    times = iter([10.0, 10.0 + interrupts.AGAIN_S / 2])
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: next(times))
    ended = False
    with interrupts.HeldBack() as stops, pytest.raises(KeyboardInterrupt), stops.batch():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        ended = True
    assert ended and not stops.torn


class Moving(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.moves = []

    def to(self, device):
        self.moves.append(torch.device(device).type)
        return self


def test_modules_go_back_to_their_device():
    net = Moving()
    with prepared([net], torch.device("meta")):
        assert net.moves == ["meta"]
    assert net.moves == ["meta", "cpu"]


def test_memory_that_a_container_uses_is_not_free(tmp_path):
    for name, text in (("limit", "1000\n"), ("used", "600\n"),
                       ("memory.stat", "anon 7\ninactive_file 100\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
    files = str(tmp_path / "limit"), str(tmp_path / "used")
    assert memory._group(files) == 500
    (tmp_path / "limit").write_text("max\n")
    assert memory._group(files) is None


def weights(spec, seed=0):
    return load_models([spec], None, seed)[0].module.state_dict()


def test_an_untrained_bundled_network_is_drawn_by_the_seed():
    one, again, other = (weights("resnet_box@random", seed)["conv1.0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_file_that_lacks_weights_of_a_bundled_network_is_refused(tmp_path):
    state = weights("vit_small_box")
    del state["norm.weight"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(VitprobeError, match=r"norm\.weight"):
        weights(f"vit_small_box@{tmp_path / 'w.pt'}")


def test_a_file_that_lacks_the_last_norm_alone_is_refused_as_well(tmp_path):
    """Some of timm's own files lack it and say so; other networks would keep a random one."""
    state = weights("test_convnext@random")
    lacks = {name: one for name, one in state.items() if not name.startswith("head.norm")}
    assert len(lacks) == len(state) - 2
    torch.save(lacks, tmp_path / "w.pt")
    with pytest.raises(VitprobeError, match=r"Missing: head\.norm\.weight, head\.norm\.bias"):
        weights(f"test_convnext@{tmp_path / 'w.pt'}")


def test_averaged_weights_are_preferred(tmp_path):
    state = weights("resnet_box@random")
    both = {"state_dict": weights("resnet_box@random", 1), "state_dict_ema": state}
    torch.save(both, tmp_path / "w.pt")
    found = weights(f"resnet_box@{tmp_path / 'w.pt'}")
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_list_of_timm_stays_as_it_was(tmp_path):
    from timm.data.readers.img_extensions import get_img_extensions

    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "i.png")
    with tarfile.open(tmp_path / "i.tar", "w") as tar:
        tar.add(tmp_path / "a" / "i.png", "a/i.png")
    before = get_img_extensions()
    assert len(open_images(tmp_path / "i.tar")) == len(open_images(tmp_path / "a")) == 1
    assert get_img_extensions() == before


def test_replicates_are_the_groups_and_not_the_batches():
    found = attention_distance.measure(
        "vit_small_box@random", np.zeros((35, 32, 32, 3), np.uint8), batch_size=1, device="cpu"
    )
    assert found.meta["replicates"] == MAX_GROUPS and found.meta["n"] == 35


def test_names_of_transformers_are_renamed_and_joined_in_order():
    start = "vit.encoder.layer.3.attention.attention"
    parts = {f"{start}.{name}.bias": torch.full((2,), float(i))
             for i, name in enumerate(("query", "key", "value"))}  # fmt: skip
    assert rename(parts)["blocks.3.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]
    swin = {
        "swin.encoder.layers.1.blocks.0.attention.self.query.bias": torch.zeros(2),
        "swin.encoder.layers.1.downsample.norm.weight": torch.ones(3),
    }
    assert rename(swin)["layers.2.downsample.norm.weight"].tolist() == [1, 1, 1]
    pooled = {
        "vision_model.encoder.layers.0.self_attn.q_proj.bias": torch.zeros(2),
        "vision_model.head.attention.in_proj_bias": torch.arange(6.0),
    }
    found = rename(pooled)
    assert found["attn_pool.q.bias"].tolist() == [0, 1]
    assert found["attn_pool.kv.bias"].tolist() == [2, 3, 4, 5]


def test_labels_of_test_images_are_matched_by_name():
    def labelled(names, n, value):
        pixels = torch.full((n, 3, 2, 2), value) + torch.arange(n)[:, None, None, None]
        labels = np.arange(n) % len(names)
        return replace(open_images(pixels), labels=labels, classes=names)

    fitting, test = labelled(("a", "b", "c"), 12, 0.0), labelled(("b", "c"), 8, 100.0)
    task = open_task(fitting, test, shots=2, draws=1, num_test=None, seed=0)
    told = [task.classes[label] for label in task.test.chosen_labels()]
    truth = [("b", "c")[i % 2] for i in task.test.order]
    assert task.classes == ("a", "b", "c")
    assert told == truth


def test_undefined_numbers_are_null():
    assert [plain(value) for value in (np.nan, np.inf, -np.inf, 0.0, 1.5)] == [None] * 3 + [0, 1.5]


def test_tables_have_all_digits():
    for name in tables.MEASURED:
        assert tables._as_text(name, np.array([0.123456789012, np.nan])) == [0.123456789012, ""]


def test_the_same_figure_has_the_same_svg():
    figure = Figure()
    figure.subplots().plot([0, 1])
    first = render(figure, "svg")
    assert render(figure, "svg") == first
    assert b"<dc:date>" not in first


def test_the_tally_counts_what_holds_and_what_does_not():
    found = [Finding("c", "s", verdict, "n") for verdict in (HOLDS, HOLDS, FAILS)]
    assert tally(found) == "Of 3 claims, 2 hold, 1 does not, and 0 are inconclusive."


def test_a_report_measures_again_what_was_asked_otherwise():
    args = {"num_images": None, "image_size": None, "batch_size": 32, "precision": "fp32",
            "seed": 0}  # fmt: skip

    def key(measurement, provenance=("net",), images="digest", **changed):
        stub = Stub(args=Stub(**{**args, **changed}), provenance=provenance, _images=images)
        return Report._fingerprint(stub, measurement)

    base = key(CKA())
    assert key(CKA()) == base
    others = [key(CKA(layers="all")), key(CKA(null=9)), key(AttentionDistance()),
              key(AttentionDistance(renormalise=True)), key(CKA(), provenance=("other",)),
              key(CKA(), images="other")]  # fmt: skip
    others += [key(CKA(), **{name: "other"}) for name in args]
    assert len({base, *others}) == len(others) + 1


def test_heads_are_compared_with_the_lowest_layers():
    layers = list("abcdef")
    ready = Stub(
        models=[Stub(name="vit"), Stub(name="cnn")],
        attention=lambda m: Stub(layers=[["attention"], []][m]),
        layers=lambda m: Stub(choose=lambda choice: layers),
    )
    assert head_subsets._choose(ready, "blocks")[1] == layers[: head_subsets.LOWEST]
    assert head_subsets.LOWEST == 4


@pytest.mark.parametrize(
    ("weights_are", "smooth", "verdict"),
    [
        ("random (seed 0)", False, HOLDS),
        ("random (seed 0)", True, FAILS),
        ("trained", True, HOLDS),
        ("trained", False, FAILS),
    ],
)
def test_smooth_stems_and_those_of_noise(weights_are, smooth, verdict):
    y, x = np.mgrid[:16, :16] / 16
    noise = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    tiles = np.repeat((y + x)[None, ..., None], 4, 0).repeat(3, -1) if smooth else noise
    result = Stub(meta={"models": [{"name": "a", "weights": weights_are}]}, of=lambda m: tiles)
    assert [one.verdict for one in dosovitskiy2021.patch_embedding(result)] == [verdict]


def test_a_bias_is_drawn_without_its_mean():
    bias = np.random.default_rng(0).normal(size=(1, 2, 5, 5))
    shown = []
    for constant in (0, 7):
        result = Stub(
            bias=bias + constant, layers=np.array(["a"]), models=["net"],
            rows_of=lambda model: np.array([0]),
        )  # fmt: skip
        image = PositionEmbeddingResult._biases(result, Figure().subplots(), 0)
        shown.append((image.get_array().filled(0), image.get_clim()))
    np.testing.assert_allclose(shown[0][0], shown[1][0], atol=1e-12)
    np.testing.assert_allclose(shown[0][1], shown[1][1])
    assert abs(shown[0][0][:5, :5].mean()) < 1e-12


@pytest.mark.parametrize(("size", "kind"), [(1, MLP), (3, CONVOLUTION), ((1, 3), CONVOLUTION)])
def test_convolutions_of_one_pixel_are_an_mlp(size, kind):
    addition = Stub(attends=False, branch_modules=["a", "b"])
    modules = {"a": nn.Conv2d(2, 2, size), "b": nn.ReLU()}
    assert branch_kind(addition, modules) == kind


@pytest.fixture
def scripts(monkeypatch):
    if not ANALYSES.is_dir():
        pytest.skip("the scripts are not part of the installed package")
    monkeypatch.syspath_prepend(str(ANALYSES))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (ANALYSES / f"{name}.py").is_file():
            del sys.modules[name]


def test_the_ratio_of_a_benchmark_is_to_the_runs_around(scripts, monkeypatch):
    import benchmarking

    times = iter([1.0, 3.0, 1.0])
    monkeypatch.setattr(benchmarking, "seconds", lambda work, device="cpu": next(times))
    cost = benchmarking.compare(lambda: 0, lambda: 0, repeats=1)
    assert cost == benchmarking.Cost(1, 3, 3)


def test_a_broken_model_is_not_one_without_what_is_measured(scripts, monkeypatch):
    pytest.importorskip("resource", reason="the script limits its processes")
    # Another package has the script's name.
    spec = importlib.util.spec_from_file_location("coverage_of_timm", ANALYSES / "coverage.py")
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, found)
    spec.loader.exec_module(found)

    def fail():
        raise VitprobeError("The layer a of net is not finite; it is the first such layer.")

    assert found.outcome(fail).startswith(f"{found.NO}: ")
    assert found.outcome(lambda: None) == found.YES
