"""Commands from the outside: what they print, write and refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vitprobe import VitprobeError, __main__, cka, load_result, redraw
from vitprobe.catalogue import GROUPS, measurements
from vitprobe.results.writing import check_folder

# Of old releases of matplotlib beside new ones of what they need.
OLD = ("matplotlib._fontconfig_pattern", "matplotlib._mathtext")
WARNINGS = ["-W", "error", *(f"-Wignore::DeprecationWarning:{name}" for name in OLD)]
# Of torch before 2.7, as Python ends.
WARNINGS.append("-Wignore:Implicitly cleaning up:ResourceWarning")


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *WARNINGS, "-m", *arguments],
        capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def arguments(pictures, out):
    return ["--models", "test_vit@random", "test_resnet@random", "--images", str(pictures),
            "--image-size", "32", "--batch-size", "6", "--out", str(out)]  # fmt: skip


def test_the_main_job_writes_its_files_and_prints_paths_and_findings(pictures, tmp_path):
    out = tmp_path / "deep" / "out"
    done = run("vitprobe.cka", *arguments(pictures, out), "--format", "png", "pdf", "svg")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    stem = "cka-test_vit-random-test_resnet-random"
    assert {p.name for p in out.iterdir()} == {f"{stem}.{s}" for s in ("png", "pdf", "svg", "npz")}
    lines = done.stdout.splitlines()
    assert lines[0] == str(out / f"{stem}.png") and lines[5] == "Raghu et al. 2021, Fig. 1"
    # Text stays text: TrueType in PDF, whose Type 3 conferences refuse, and letters in SVG.
    pdf, svg = (out / f"{stem}.pdf").read_bytes(), (out / f"{stem}.svg").read_text("utf-8")
    assert b"/CIDFontType2" in pdf and b"/Type3" not in pdf and ">blocks.0</text>" in svg
    with np.load(out / f"{stem}.npz", allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
    assert meta["n"] == 12 and meta["batch_size"] == 6 and meta["seed"] == 0
    assert [m["weights"] for m in meta["models"]] == ["random (seed 0)"] * 2
    assert all(len(m["weights_sha256"]) == 64 for m in meta["models"])


def test_redraw_needs_no_model_and_loses_nothing(pictures, tmp_path, capsys):
    assert cka.main([*arguments(pictures, tmp_path / "a"), "--stem", "x"]) == 0
    npz = tmp_path / "a" / "x.npz"
    before = npz.read_bytes()
    assert redraw.main([str(npz), "--format", "svg", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "x.svg").is_file() and npz.read_bytes() == before
    assert redraw.main([str(npz)]) == 0 and (tmp_path / "a" / "x.png").is_file()
    # A title is drawn over the figure and can be another one.
    assert load_result(npz).figure().get_suptitle() == ""
    assert redraw.main([str(npz), "--title", "Ours", "--format", "svg", "--stem", "titled"]) == 0
    titled = tmp_path / "a" / "titled.svg"
    assert ">Ours</text>" in titled.read_text("utf-8")
    assert "Ours" not in (tmp_path / "b" / "x.svg").read_text("utf-8")
    capsys.readouterr()
    (tmp_path / "torn.npz").write_bytes(before[:1000])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "evil.npz", meta=np.array(json.dumps({"analysis": "__main__"})))
    for name, message in [
        ("none.npz", "No such result file"),
        ("torn.npz", "is not a result file of vitprobe"),
        ("other.npz", "is not a result file of vitprobe"),
        ("evil.npz", "is not a measurement of vitprobe"),
    ]:
        assert redraw.main([str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--models", "vit_b61@random"], "Did you mean vit_b16"),
        (["--layers", "blokcs.0"], "has no layer 'blokcs.0'"),
        (["--images", "nowhere"], "--images: no such file or folder: 'nowhere'."),
        (["--num-images", "3"], "at least 4 are needed"),
        (["--num-images", "many"], "--num-images: expected a whole number, not 'many'"),
        (["--batch-size", "-1"], "must be at least 1"),
        (["--image-size", "-5"], "must be at least 1"),
        (["--precision", "fp8"], "--precision: expected fp32 or bf16, not 'fp8'"),
        (["--format", "bmp"], "--format: expected png, pdf or svg, not 'bmp'"),
        (["--stem", "a/b"], "without folders"),
        (["--device", "nope"], "--device: 'nope' is not available on this machine, which has cpu"),
        (["--banana"], "unknown option --banana"),
        (["--model", "test_vit@random"], "unknown option --model. Did you mean --models?"),
        (["--batchsize=4"], "unknown option --batchsize. Did you mean --batch-size?"),
        (
            ["--quiet", "resnet50"],
            "unexpected argument 'resnet50'. Did you mean --models resnet50?",
        ),
        (["--models"], "--models: expected at least one argument"),
    ],
)
def test_wrong_input_gets_one_line_and_leaves_nothing(pictures, tmp_path, capsys, changes, message):
    out = tmp_path / "out"
    try:
        status = cka.main([*arguments(pictures, out), *changes])
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr()
    assert status == 2 and message in told.err and told.err.count("\n") == 1 and told.out == ""
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_says_how_to_go_on_exits_130_and_the_same_command_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "p.npy", pixels)
    out = tmp_path / "out"
    command = [
        "vitprobe.cka", "--models", "test_vit@random", "--images", str(tmp_path / "p.npy"),
        "--image-size", "32", "--batch-size", "4", "--save-every", "0", "--out", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not list(out.glob(".*.partial")):
        time.sleep(0.05)
    # As a terminal does it: the whole group, the workers too.
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130
    assert re.search(r"Stopped after batch \d+ of 100; run the same command to resume\.\n", told)
    assert "Traceback" not in told and [p.suffix for p in out.iterdir()] == [".partial"]
    done = run(*command)
    assert done.returncode == 0 and "Resuming after batch" in done.stderr
    assert {p.suffix for p in out.iterdir()} == {".png", ".npz"}


def test_ctrl_c_while_libraries_are_loaded_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "import_module", interrupted)
    assert __main__.main(["cka"]) == 130
    assert capsys.readouterr().err == "vitprobe: Stopped.\n"


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "OSError"])
def test_ctrl_c_while_a_module_loads_libraries_is_one_line_as_well(name, tmp_path):
    (tmp_path / "torch.py").write_text(f"raise {name}")
    done = subprocess.run(
        [sys.executable, "-m", "vitprobe.cka"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode
    if name == "KeyboardInterrupt":
        assert done.stderr == "vitprobe: Stopped.\n"
    else:
        assert "Traceback" in done.stderr and done.stderr.endswith("OSError\n")


def test_debug_shows_the_traceback(pictures, tmp_path, capsys):
    assert cka.main([*arguments(pictures, tmp_path), "--models", "nope", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_fails_before_the_work(pictures, tmp_path, capsys):
    out = tmp_path / "locked"
    out.mkdir(mode=0o500)
    assert cka.main(arguments(pictures, out)) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_fails_before_the_work(pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cka.main(arguments(pictures, tmp_path / "file")) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
@pytest.mark.parametrize("out", ["round", "nowhere", "nowhere/below"])
def test_an_output_folder_whose_link_leads_nowhere_is_told_as_that(out, tmp_path):
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(VitprobeError, match=r"(round|nowhere) is a link that leads nowhere\.$"):
        check_folder(tmp_path / out)


def test_a_folder_in_the_place_of_the_numbers_fails_before_the_work(pictures, tmp_path, capsys):
    (tmp_path / "x.npz").mkdir()
    assert cka.main([*arguments(pictures, tmp_path), "--stem", "x"]) == 2
    assert "x.npz cannot be written: a folder has its name." in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.suffix] == ["x.npz"]


def test_a_write_that_fails_half_way_leaves_neither_file_and_loses_nothing(
    pictures, tmp_path, monkeypatch, capsys
):
    out, write = tmp_path / "out", os.fsync

    def full(handle):
        # The state is saved first; the numbers come after the figure.
        if list(out.glob(".*.npz.*")):
            raise OSError(28, "No space left on device")
        write(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert cka.main(arguments(pictures, out)) == 2
    told = capsys.readouterr().err
    assert "No space left on device. Run the same command to resume." in told
    assert [path.suffix for path in out.iterdir()] == [".partial"]
    monkeypatch.setattr(os, "fsync", write)
    assert cka.main(arguments(pictures, out)) == 0
    assert "Resuming after batch 2 of 2" in capsys.readouterr().err
    assert {path.suffix for path in out.iterdir()} == {".png", ".npz"}


def test_the_list_of_commands_and_the_installed_script(capsys):
    assert __main__.main([]) == 0
    listed = capsys.readouterr().out
    assert "cka" in listed and "redraw" in listed
    headings = [line for line in listed.splitlines() if line and line[0].isupper()]
    assert headings[: len(GROUPS)] == list(GROUPS.values()) and "Weights" in headings
    for name in (*measurements(), "report", "redraw", "models", "layers"):
        assert f"\n  {name} " in listed
    assert __main__.main(["ckaa"]) == 2
    assert "unknown command 'ckaa'. Did you mean cka?" in capsys.readouterr().err
    assert __main__.main(["--version"]) == 0


@pytest.mark.parametrize("name", [*measurements(), "report", "redraw", "models", "layers"])
def test_help_fits_two_screens_and_ends_with_two_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        __main__.main([name, "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and len(told.splitlines()) <= 64
    *_, heading, first, second = told.splitlines()
    assert heading == "examples:"
    assert first.startswith(f"  vitprobe {name}") and second.startswith(f"  vitprobe {name}")


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "vitprobe"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, vitprobe; print(any(m in sys.modules for m in ('torch', 'timm')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_results_load_from_python(pictures, tmp_path):
    assert cka.main([*arguments(pictures, tmp_path), "--stem", "x"]) == 0
    result = load_result(tmp_path / "x.npz")
    assert type(result) is cka.CKAResult
    assert result._repr_png_().startswith(b"\x89PNG")
