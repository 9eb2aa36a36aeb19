"""Machines with disks of their own: one decision, nothing left behind, nothing waited for."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitprobe import VitprobeError, cka, extract, skip_ratio
from vitprobe.__main__ import main
from vitprobe.running.checkpoint import Checkpoint
from vitprobe.running.loading import TransformedImages
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_each

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are forked, which elsewhere is not safe"
)
SIZE, BATCHES, PATIENCE_S = 4, 6, 120


@pytest.fixture
def nodes(tmp_path):
    """Two folders, each of which stands for a machine's disk, with the same images."""
    generator = np.random.default_rng(0)
    for i in range(SIZE * BATCHES):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for node in "01":
            folder = tmp_path / node / "images"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            os.utime(folder / f"{i}.png", (1, 1))
    return tmp_path


def _start(rank, port, node, work, out):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    os.chdir(node)
    told = open(out, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(told.fileno(), 1)
    os.dup2(told.fileno(), 2)
    sys.stdout = sys.stderr = told
    status = work()
    told.flush()
    os._exit(int(status or 0))


def on_two_nodes(nodes, work):
    """Exit statuses, and what both printed, of ``work`` in a process on each node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    outs = [nodes / f"{rank}.txt" for rank in range(2)]
    children = [
        fork.Process(target=_start, args=(rank, port, nodes / str(rank), work, outs[rank]))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE_S)
        if child.is_alive():
            child.kill()
            pytest.fail(f"waits: {[out.read_text() for out in outs]}")
    del store
    return [child.exitcode for child in children], "".join(out.read_text() for out in outs)


def arguments(*more):
    return ["cka", "--models", "test_vit@random", "--images", "images", "--image-size", "32",
            "--batch-size", str(SIZE), "--workers", "0", "--device", "cpu", "--save-every", "0",
            "--out", "out", "--stem", "x", *more]  # fmt: skip


def partials(nodes, node):
    """How many batches each state on a node's disk holds."""
    found = {}
    for file in sorted((nodes / node / "out").glob(".x.*.partial")):
        with np.load(file) as state:
            found[file.name] = int(state["_done"].sum())
    return found


def stopped(nodes):
    """A run on two nodes, both stopped after two of their three batches."""
    read = TransformedImages.__getitem__

    def stops(self, position):
        if position >= 4 * SIZE:
            (nodes / f"stopped{os.environ['RANK']}").touch()
            deadline = time.monotonic() + PATIENCE_S
            while not all((nodes / f"stopped{r}").exists() for r in "01"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise KeyboardInterrupt
        return read(self, position)

    def work():
        TransformedImages.__getitem__ = stops
        return main(arguments())

    try:
        return on_two_nodes(nodes, work)
    finally:
        TransformedImages.__getitem__ = read


def whole(nodes):
    here = os.getcwd()
    os.chdir(nodes / "0")
    try:
        assert main([*arguments("--quiet"), "--out", "alone"]) == 0
    finally:
        os.chdir(here)
    with np.load(nodes / "0" / "alone" / "x.npz") as file:
        return file["cka"]


def test_a_stopped_run_goes_on_from_what_lies_on_both_disks(nodes):
    expected = whole(nodes)
    status, told = stopped(nodes)
    assert status == [130, 130], told
    (mine,) = partials(nodes, "0")
    assert list(partials(nodes, "0").values()) == list(partials(nodes, "1").values()) == [2]
    # What one node has of the other's counts once, and what is no state is none.
    (nodes / "1" / "out" / mine).write_bytes((nodes / "0" / "out" / mine).read_bytes())
    (nodes / "0" / "out" / mine.replace(".0.", ".7.")).write_bytes(b"torn")
    status, told = on_two_nodes(nodes, lambda: main(arguments()))
    assert status == [0, 0] and "Resuming after batch 4 of 6" in told, told
    with np.load(nodes / "0" / "out" / "x.npz") as file:
        np.testing.assert_allclose(file["cka"], expected, rtol=0, atol=1e-9)
    assert sorted(os.listdir(nodes / "0" / "out")) == ["x.npz", "x.png"]
    assert os.listdir(nodes / "1" / "out") == []


@pytest.mark.parametrize("more", [[], ["--fresh"]], ids=["resumed", "fresh"])
def test_a_node_that_has_lost_its_state_does_its_part_again(more, nodes):
    # Copies of other times are the same images.
    for i in range(SIZE * BATCHES):
        os.utime(nodes / "1" / "images" / f"{i}.png", (2, 2))
    expected = whole(nodes)
    stopped(nodes)
    (lost,) = (nodes / "0" / "out").glob(".x.*.partial")
    lost.unlink()
    status, told = on_two_nodes(nodes, lambda: main(arguments(*more)))
    assert status == [0, 0], told
    assert ("Resuming after batch 2 of 6" in told) is not bool(more)
    with np.load(nodes / "0" / "out" / "x.npz") as file:
        np.testing.assert_allclose(file["cka"], expected, rtol=0, atol=1e-9)
    assert os.listdir(nodes / "1" / "out") == []


def test_nodes_that_see_other_images_or_options_are_told(nodes):
    (nodes / "1" / "images" / "3.png").unlink()
    status, told = on_two_nodes(nodes, lambda: main(arguments()))
    assert status == [2, 2]
    assert told.count("\n") == 1 and "Process 1 has other images than process 0" in told
    (nodes / "0" / "images" / "3.png").unlink()
    status, told = on_two_nodes(nodes, lambda: main(arguments("--seed", os.environ["RANK"])))
    assert status == [2, 2] and told.count("\n") == 1
    assert "Process 1 has other models than process 0" in told


def test_activations_need_a_folder_that_all_nodes_share(nodes):
    here = os.getcwd()
    extracting = ["extract", *arguments()[1:-2], "--quiet", "--layers", "blocks.1"]
    # The other node has files of an earlier run.
    os.chdir(nodes / "1")
    try:
        assert main([*extracting, "--seed", "1"]) == 0
    finally:
        os.chdir(here)
    status, told = on_two_nodes(nodes, lambda: main(extracting))
    assert status == [2, 2]
    assert told.count("\n") == 1 and "--out: out is not one folder for all processes" in told
    shared = [*extracting, "--out", str(nodes / "shared")]
    status, told = on_two_nodes(nodes, lambda: main(shared))
    assert status == [0, 0], told
    pixels = Path(nodes / "0" / "images")
    alone = extract("test_vit@random", pixels, layers="blocks.1", image_size=32, batch_size=SIZE,
                    out=nodes / "alone", device="cpu", workers=0)  # fmt: skip
    (folder,) = alone.values()
    np.testing.assert_array_equal(
        np.load(nodes / "shared" / folder.name / "blocks.1.npy"), np.load(folder / "blocks.1.npy")
    )


def test_a_report_that_lies_on_one_disk_is_not_measured_by_the_other_alone(nodes):
    asked = ["report", *arguments()[1:-2], "--only", "cka"]
    for _ in range(2):
        status, told = on_two_nodes(nodes, lambda: main(asked))
        assert status == [0, 0], told
    assert not [name for name in os.listdir(nodes / "1" / "out") if name.endswith(".partial")]


def test_processes_go_on_together_where_one_of_them_fails(nodes):
    measurements = {"skip_ratio": skip_ratio.MEASUREMENT(), "cka": cka.MEASUREMENT()}
    options = Options(batch_size=SIZE, workers=0, device="cpu", image_size=32, quiet=True)
    images = nodes / "0" / "images"
    expected = cka.measure("test_vit@random", images, image_size=32, batch_size=SIZE, workers=0,
                           device="cpu")  # fmt: skip

    def fails(self, batch):
        if os.environ.get("RANK") == "1" and batch.index > 2:
            raise VitprobeError("odd batch")
        return end(self, batch)

    end = skip_ratio._Watch.end

    def work():
        skip_ratio._Watch.end = fails
        found = measure_each(measurements, "test_vit@random", images, options, go_on=True)
        assert found.failed == {"skip_ratio": "odd batch"}, found.failed
        np.testing.assert_allclose(found["cka"].cka, expected.cka, rtol=0, atol=1e-9)
        assert found["cka"].meta["n"] == SIZE * BATCHES

    status, told = on_two_nodes(nodes, work)
    assert status == [0, 0], told


def test_states_of_earlier_processes_are_loaded_once(tmp_path):
    facts, ones = {"x": 1}, {"a": torch.ones(2, dtype=torch.float64)}

    def of(rank, folder="one"):
        (tmp_path / folder).mkdir(exist_ok=True)
        return Checkpoint(tmp_path / folder / "s", facts, 3, rank)

    first, second = np.array([True, False, False]), np.array([False, True, False])
    of(0).save(ones, first)
    of(1).save(ones, second)
    of(1, "two").save(ones, np.array([False, True, True]))
    totals = [{"a": torch.zeros(2, dtype=torch.float64)} for _ in range(2)]
    done = of(0).load(totals[0])
    assert done.tolist() == [True, True, False] and totals[0]["a"].tolist() == [2, 2]
    # In the folder that they share there is nothing new, in one of its own too much.
    for folder in ("one", "two"):
        assert not of(1, folder).load(totals[1], known=done).any()
    assert totals[1]["a"].tolist() == [0, 0]
