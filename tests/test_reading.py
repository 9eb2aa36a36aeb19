"""Result files, states and weights that are damaged or forged: one line, or measured anew."""

import json
import os
import random
import re
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch

from vitprobe import VitprobeError, cka, load_model, load_result, open_images, redraw
from vitprobe.report import command as report_command
from vitprobe.results import archives
from vitprobe.running.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def result():
    return cka.measure("test_vit@random", torch.randn(12, 3, 32, 32), image_size=32)


def test_flipped_bits_are_one_line_or_change_nothing(result, tmp_path):
    content, path = result.npz(), tmp_path / "x.npz"
    generator, told = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            again = load_result(path)
        except VitprobeError as error:
            told += 1
            assert "x.npz" in str(error) and "\n" not in str(error)
        else:
            for name, array in result.arrays().items():
                np.testing.assert_array_equal(again.arrays()[name], array)
    assert told > 100


def with_other_lengths(content):
    """An archive with a bit flipped in each length of its directory's entries, one at a time."""
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", content)]
    assert len(entries) > 1
    for at in (entry + field for entry in entries for field in range(28, 34)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            yield damaged


def test_no_array_is_lost_behind_a_damaged_length(result, tmp_path):
    """What came with a later version is optional, and so are labels beside images."""
    path = tmp_path / "x.npz"
    for damaged in with_other_lengths(result.npz()):
        path.write_bytes(damaged)
        with suppress(VitprobeError):
            assert load_result(path).null_q95.shape == result.null_q95.shape
            assert load_result(path).null_max_q95.shape == (1, 1)
    np.savez(path, images=np.zeros((6, 8, 8, 3), np.uint8), labels=np.arange(6) % 2)
    for damaged in with_other_lengths(path.read_bytes()):
        path.write_bytes(damaged)
        with suppress(VitprobeError):
            assert open_images(path).classes == ("0", "1")


def test_a_result_that_unfolds_beyond_the_memory_is_not_unfolded(result, tmp_path, monkeypatch):
    path = forged(result, tmp_path / "x.npz")
    monkeypatch.setattr(archives, "memory", lambda: 100)
    for read in (load_result, lambda path: cka.from_features(str(path))):
        with pytest.raises(VitprobeError, match=r"x\.npz unfolds to .* GiB, more than the memory"):
            read(path)


def forged(result, path, meta=None, **arrays):
    known = result.arrays() | arrays
    text = json.dumps(result.meta | (meta or {}))
    np.savez(path, meta=np.array(text), **known)
    return path


@pytest.mark.parametrize(
    ("arrays", "meta", "message"),
    [
        ({"cka": np.zeros(3)}, {}, r"cka in .* is \(3,\), not an array over layer, layer_2"),
        ({"layers": np.array(["a"])}, {}, "places along layer, other arrays have"),
        ({"cka": np.zeros((6, 6), "M8[s]")}, {}, r"of type datetime64\[s\], not numbers or names"),
        ({"model_of_layer": np.full(6, 7)}, {}, "models that it does not have"),
        ({"model_of_layer": np.full(6, np.nan)}, {}, "models that it does not have"),
        ({}, {"models": []}, "does not say which models"),
        ({}, {"models": ["vit"]}, "does not say which models"),
        ({}, {"models": 3}, "does not say which models"),
        ({}, {"analysis": "os"}, "holds 'os', which is not a measurement"),
        ({}, {"analysis": ["cka"]}, "is not a result file"),
    ],
)
def test_forged_results_are_refused_by_what_is_wrong(arrays, meta, message, result, tmp_path):
    assert len(result.layers) == 6
    with pytest.raises(VitprobeError, match=message):
        load_result(forged(result, tmp_path / "x.npz", meta, **arrays))


def test_files_that_are_no_results(result, tmp_path):
    contents = {"text": b"no archive", "empty": b"", "list": json.dumps([1]).encode()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VitprobeError, match="is not a result file"):
            load_result(tmp_path / name)
    deep = "[" * 100_000
    np.savez(tmp_path / "deep.npz", meta=np.array(deep))
    huge = b"\x93NUMPY\x01\x00\x76\x00" + (
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 100000), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("meta.npy", huge)
    for name in ("deep.npz", "huge.npz"):
        with pytest.raises(VitprobeError, match="is not a result file"):
            load_result(tmp_path / name)


def test_a_result_that_cannot_be_drawn_is_one_line(result, tmp_path, capsys):
    path = forged(result, tmp_path / "x.npz", {"images": 3})
    assert redraw.main([str(path)]) == 2
    told = capsys.readouterr().err
    assert "x.npz cannot be drawn, it is damaged or of another version" in told
    assert told.count("\n") == 1


def test_a_report_measures_anew_what_its_files_have_lost(tmp_path, capsys):
    arguments = ["--models", "vit_small_box", "--only", "position_embedding", "--stem", "x",
                 "--out", str(tmp_path)]  # fmt: skip
    assert report_command.main(arguments) == 0
    path = tmp_path / "x-position_embedding.npz"
    wanted = load_result(path).arrays()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(VitprobeError):
        load_result(path)
    assert report_command.main(arguments) == 0
    for name, array in load_result(path).arrays().items():
        np.testing.assert_array_equal(array, wanted[name])
    capsys.readouterr()


# States of unfinished runs


def test_forged_states_are_not_trusted(tmp_path):
    def state():
        return {"a": torch.zeros(2, dtype=torch.float64)}

    def fresh():
        return Checkpoint(tmp_path / "s", {"x": 1}, 3, 0)

    checkpoint = fresh()
    checkpoint.save({"a": torch.ones(2, dtype=torch.float64)}, np.array([True, False, True]))
    file = next(tmp_path.glob("*.partial"))
    with np.load(file) as loaded:
        good = dict(loaded)
    total = state()
    assert fresh().load(total).sum() == 2 and total["a"].tolist() == [1, 1]
    for change in (
        {"a": good["a"].astype(">f8")},
        {"a": good["a"].astype(np.float32)},
        {"a": good["a"].astype(np.int64)},
        {"a": good["a"][None]},
        {"_key": np.array("other")},
        {"_done": good["_done"].astype(np.int8)},
        {"more": np.zeros(1)},
    ):
        np.savez(file.with_suffix(".npz"), **(good | change))
        os.replace(file.with_suffix(".npz"), file)
        total = state()
        assert fresh().load(total).sum() == 0 and total["a"].tolist() == [0, 0]


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_in_the_place_of_a_state_is_not_waited_for(tmp_path):
    checkpoint = Checkpoint(tmp_path / "s", {"x": 1}, 3, 0)
    os.mkfifo(tmp_path / f"s.{checkpoint.key[:12]}.0.partial")
    total = {"a": torch.zeros(2, dtype=torch.float64)}
    assert checkpoint.load(total).sum() == 0


def test_an_archive_that_unfolds_far_beyond_a_state_is_not_unfolded(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "s", {"x": 1}, 3, 0)
    file = tmp_path / f"s.{checkpoint.key[:12]}.0.partial"
    with file.open("wb") as stream:
        np.savez_compressed(stream, a=np.zeros(10**6))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unfolded"))
    assert checkpoint.load({"a": torch.zeros(2, dtype=torch.float64)}).sum() == 0


# Weights


@pytest.mark.parametrize("content", [{0: torch.zeros(2), 1: torch.ones(2)}, [torch.zeros(2)],
                                     {("a", 1): torch.zeros(2)}, torch.zeros(2), 7])  # fmt: skip
def test_weights_without_names_are_one_line(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(VitprobeError, match=r"w\.pth") as caught:
        load_model(f"test_vit@{tmp_path}/w.pth")
    assert "\n" not in str(caught.value)
