"""The measurement that CONTRIBUTING.md shows is one: it runs wherever the others do."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vitprobe
from vitprobe.catalogue import measurements
from vitprobe.models.loading import wrap

TEXT = Path(__file__).parents[1] / "CONTRIBUTING.md"
# What a process does to have the module: it is no file of the package.
FOUND = "import sys, vitprobe; vitprobe.__path__.append(sys.argv[1])\n"
MODELS = ["test_vit@random", "test_resnet@random"]
ARGUMENTS = ["--models", *MODELS, "--image-size", "32", "--device", "cpu", "--quiet"]
ARGUMENTS += ["--num-images", "12", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not TEXT.is_file():
        pytest.skip("CONTRIBUTING.md is not beside the tests")
    (source,) = re.findall(r"```python\n(.*?)```", TEXT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(source.splitlines()) < 130
    where = tmp_path_factory.mktemp("package")
    (where / "mean_norm.py").write_text(source, encoding="utf-8")
    return where


@pytest.fixture
def mean_norm(folder):
    vitprobe.__path__.append(str(folder))
    try:
        yield import_module("vitprobe.mean_norm")
    finally:
        vitprobe.__path__.remove(str(folder))


def test_it_measures_what_it_says(mean_norm):
    torch.manual_seed(0)
    net = timm.create_model("test_vit", img_size=32).eval()
    images = torch.randn(9, 3, 32, 32)
    found = mean_norm.measure(wrap(net, "net"), images, batch_size=4)
    wide = net.double()
    maps = wide.forward_intermediates(images.double(), output_fmt="NLC", intermediates_only=True,
                                      return_prefix_tokens=True)  # fmt: skip
    norms = [
        torch.cat([prefix, patches], 1).detach().flatten(1).norm(dim=1) for patches, prefix in maps
    ]
    np.testing.assert_allclose(found.norm, [one.mean() for one in norms], rtol=1e-5)
    np.testing.assert_allclose(found.norm_se, [one.std() / 3 for one in norms], rtol=1e-3)


def test_command_table_list_and_report_know_it(mean_norm, tmp_path, capsys):
    assert measurements()["mean_norm"].line.startswith("How large activations are")
    assert mean_norm.main([*ARGUMENTS, "--out", str(tmp_path), "--stem", "n"]) == 0
    assert "n.png" in capsys.readouterr().out
    alone = vitprobe.load_result(tmp_path / "n.npz")
    assert alone.to_csv(tmp_path / "n.csv").read_text(encoding="utf-8").count("norm,") >= 10
    from vitprobe import report

    arguments = [*ARGUMENTS, "--out", str(tmp_path), "--stem", "r", "--only", "mean_norm", "cka"]
    assert report.main(arguments) == 0
    assert "A line that rises grows with depth." in (tmp_path / "r.html").read_text("utf-8")
    joint = vitprobe.load_result(tmp_path / "r-mean_norm.npz")
    np.testing.assert_allclose(joint.norm, alone.norm, rtol=1e-9)


def test_it_resumes_after_a_kill_and_shares_its_batches(mean_norm, folder, tmp_path):
    code = FOUND + "from vitprobe import mean_norm; sys.exit(mean_norm.main(sys.argv[2:]))"
    arguments = [str(folder), *ARGUMENTS, "--save-every", "0", "--out", str(tmp_path)]
    assert mean_norm.main([*ARGUMENTS, "--out", str(tmp_path), "--stem", "whole"]) == 0
    # As a process that is killed when it has done one batch of three.
    dies = code.replace(
        "sys.exit(", "w = mean_norm._Watch; end, seen = w.end, []\n"
        "def killed(self, batch):\n    seen.append(1)\n"
        "    len(seen) > 1 and os.kill(os.getpid(), 9)\n    end(self, batch)\n"
        "w.end = killed\nsys.exit("
    ).replace("import sys,", "import os, sys,")  # fmt: skip
    died = subprocess.run([sys.executable, "-c", dies, *arguments, "--stem", "n"])
    assert died.returncode in (-9, 9)  # Windows has its own way to count
    assert list(tmp_path.glob(".n.*.partial"))
    script = tmp_path / "run.py"
    script.write_text(code, encoding="utf-8")
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *run, *arguments, "--stem", "n"], env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, whole = (vitprobe.load_result(tmp_path / f"{name}.npz") for name in ("n", "whole"))
    # Processes of one thread each: another number of threads may change float32's last digits.
    np.testing.assert_allclose(found.norm, whole.norm, rtol=1e-6)
    assert found.meta["n"] == whole.meta["n"] == 12
