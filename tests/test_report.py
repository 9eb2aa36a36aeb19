"""The report: one page that stands alone, says every verdict, and goes on where it was stopped."""

import argparse
import base64
import contextlib
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vitprobe import VitprobeError, cka, cli, load_result, patch_embedding, report, skip_ratio
from vitprobe.catalogue import measurements
from vitprobe.report import command, grid
from vitprobe.report import panels as report_panels
from vitprobe.report.page import page
from vitprobe.results import drawing
from vitprobe.results.result import FAILS, HOLDS, OPEN, Finding
from vitprobe.results.tables import long_table

STEM = "report-test_vit-random-test_resnet-random"
MODELS = ["--models", "test_vit@random", "test_resnet@random"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "some.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(60) % 2)
    return path


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """(folder, exit status, what was printed) of a whole report."""
    out, told = tmp_path_factory.mktemp("report"), io.StringIO()
    with contextlib.redirect_stdout(told):
        status = report.main(arguments(images, out))
    return out, status, told.getvalue()


def arguments(images, out):
    return [*MODELS, "--images", str(images), "--image-size", "32", "--num-images", "12",
            "--batch-size", "6", "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="module")
def begun(images, tmp_path_factory):
    """The folder of a report of two cheap measurements."""
    out = tmp_path_factory.mktemp("begun")
    with contextlib.redirect_stdout(io.StringIO()):
        assert quick(images, out) == 0
    return out


@pytest.fixture
def again(begun, tmp_path):
    """A copy of it."""
    return shutil.copytree(begun, tmp_path / "again")


def text_of(out):
    return (out / f"{STEM}.html").read_text(encoding="utf-8")


def quick(images, out, *more):
    """The cheap measurements alone."""
    return report.main([*arguments(images, out), "--only", "cka", "patch_embedding", *more])


def test_every_measurement_is_on_the_page_with_its_numbers_beside(made):
    out, status, told = made
    assert status == 0
    page_path, tally, took = told.splitlines()
    assert page_path == str(out / f"{STEM}.html") and took.startswith("Took ")
    text = text_of(out)
    written = dict.fromkeys(re.findall(r'href="([^"#]*\.npz)"', text))
    results = [load_result(out / name) for name in written]
    assert [result.analysis for result in results] == list(measurements())
    verdicts = Counter(one.verdict for result in results for one in result.findings())
    assert tally.startswith(f"Of {verdicts.total()} claims, {verdicts['holds']} hold")
    for path in re.findall(r'href="([^"#]*\.npz)"', text):
        assert (out / path).is_file()
    assert len(re.findall(r"<figure>", text)) == len(measurements())
    for result in results:
        for finding in result.findings():
            for part in (finding.claim, finding.numbers):
                assert html.escape(part, quote=False) in text.replace("&#39;", "'")
    assert text.count("<details ") == verdicts.total()


def test_what_a_model_cannot_have_is_one_line_and_no_error(made):
    out, _, _ = made
    text = html.unescape(text_of(out))
    assert "test_resnet (random) has no attention between places" in text
    assert "test_resnet (random) has no position embedding to show" in text
    distance = load_result(out / f"{STEM}-attention_distance.npz")
    assert distance.models == ["test_vit (random)"]
    assert list(distance.meta["without"]) == ["test_resnet (random)"]


def test_the_page_needs_nothing_from_elsewhere(made):
    text = text_of(made[0])
    assert not re.search(r"https?://", text) and "default-src 'none'" in text
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert attribute.startswith(("#", "data:")) or (made[0] / attribute).is_file()
    for picture in re.findall(r'src="data:image/png;base64,([^"]*)"', text):
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert len(text) < 8_000_000


def test_the_page_can_be_read_without_seeing_it(made):
    text = text_of(made[0])
    figures, small = re.findall(r'<img alt="([^"]*)" width', text), text.count('<img alt="" src')
    # What the small ones show stands beside them, in the same link.
    assert all(figures) and text.count("<img ") == len(figures) + small
    assert len(re.findall(r'<a href="#[^"]+"><img alt="" src="[^"]+">[^<]+</a>', text)) == small
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - level <= 1 for level, later in itertools.pairwise(levels))
    assert text.count("<table") == text.count("<caption")
    anchors = re.findall(r'id="([^"]*)"', text)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r'href="#([^"]*)"', text)) <= set(anchors)


def test_every_result_becomes_a_table_of_all_its_numbers(made):
    for path in made[0].glob("*.npz"):
        result = load_result(path)
        table = long_table(result)
        for name in dict.fromkeys(table["quantity"].tolist()):
            values = np.asarray(getattr(result, name), dtype=float)
            there = values[~np.isnan(values)]
            assert np.array_equal(table["value"][table["quantity"] == name], there)


def test_columns_of_claims_say_who_is_untrained(images, tmp_path, capsys):
    assert quick(images, tmp_path, "--names", "A", "B") == 0
    (page,) = tmp_path.glob("*.html")
    table = page.read_text(encoding="utf-8").partition("<thead>")[2].partition("</thead>")[0]
    assert "A (untrained) × B (untrained)" in table.replace("<wbr>", "")


def test_the_same_command_measures_nothing_again(images, begun, again, monkeypatch):
    monkeypatch.setattr(command, "measure_each", None)
    (again / f"{STEM}.html").unlink()
    assert quick(images, again) == 0
    for path in begun.glob("*"):
        if path.suffix == ".html":
            # The command line stands on the page, and names another folder.
            continue
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert text_of(again).count("<figure>") == 2


@pytest.mark.parametrize("change", [["--seed", "1"], ["--batch-size", "4"], ["--fresh"]])
def test_another_run_measures_again(images, again, monkeypatch, change):
    class Measured(Exception):
        pass

    def measure(*args, **options):
        raise Measured

    monkeypatch.setattr(cka.CKA, "prepare", measure)
    with pytest.raises(Measured):
        quick(images, again, *change)


def test_a_stopped_run_exits_130_and_resumes_with_the_same_command(
    images, tmp_path, monkeypatch, capsys
):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(patch_embedding.PatchEmbedding, "of", stop)
        assert quick(images, tmp_path) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    assert report.main([*arguments(images, tmp_path), "--only", "cka", "patch_embedding"]) == 0
    assert not list(tmp_path.glob(".*"))


def test_a_measurement_that_fails_is_told_and_spoils_no_other(
    images, tmp_path, monkeypatch, capsys
):
    def fail(*args, **options):
        raise VitprobeError("The layer <x> is not finite.")

    monkeypatch.setattr(skip_ratio.SkipRatio, "prepare", fail)
    only = ["--only", "skip_ratio", "patch_embedding"]
    assert report.main([*arguments(images, tmp_path), *only]) == 2
    assert "1 of 2 measurements failed: skip_ratio: The layer" in capsys.readouterr().err
    text = text_of(tmp_path)
    assert "failed: The layer &lt;x&gt; is not finite." in text and "patch_embedding.npz" in text


def test_many_models_make_no_name_that_is_too_long():
    args = argparse.Namespace(
        stem=None, names=None, models=[f"resnet50.a{i}_in1k" for i in range(30)]
    )
    other = argparse.Namespace(stem=None, names=None, models=[*args.models, "one_more"])
    assert len(cli.stem(args, "report")) < 150 and cli.stem(args, "report") != cli.stem(
        other, "report"
    )


def test_images_without_labels_have_no_probes(pictures, tmp_path):
    for path in sorted(pictures.rglob("*.png")):
        path.rename(pictures / path.name)
    for folder in ("cat", "dog"):
        (pictures / folder).rmdir()
    only = ["--only", "linear_probe", "patch_embedding"]
    assert report.main([*arguments(pictures, tmp_path / "out"), *only]) == 0
    assert "has no labels" in text_of(tmp_path / "out")


def test_what_users_write_is_text_and_never_markup(images, tmp_path):
    name = "</script><img src=x onerror=alert(1)>"
    model = {"name": name, "timm_name": name, "weights": name, "weights_sha256": "0",
             "input_size": None, "transform": name}  # fmt: skip
    text = page([], [("cka", name)], [model], f"run {name}")
    assert name not in text and text.count("</script>") == 2
    # The title twice, the reason, four lines of the model's card, its digest, the command.
    assert text.count("&lt;img src=x") == 9


@pytest.mark.parametrize("origin", ["upper", "lower"])
def test_a_heat_map_is_found_where_it_is_drawn(origin):
    values = np.random.default_rng(0).random((3, 4))
    values[1, 2] = np.nan
    figure = drawing.new_figure(5, 4)
    ax = figure.subplots()
    image = ax.imshow(values, origin=origin, aspect="auto", vmin=0, vmax=1, cmap="magma")
    drawing.layer_axis(ax.yaxis, ["a", "b", "c"], "rows")
    figure.colorbar(image)
    pixels = np.asarray(Image.open(io.BytesIO(drawing.render(figure, "png"))).convert("RGB"))
    (panel,) = report_panels.find_panels(figure)
    steps = np.frombuffer(base64.b64decode(panel["data"]), "<u2").reshape(3, 4)
    told = panel["low"] + (panel["high"] - panel["low"]) * steps / report_panels.STEPS
    assert steps[1, 2] == report_panels.STEPS + 1
    known = np.isfinite(values)
    assert np.abs(told - values)[known].max() <= np.nanmax(values) / report_panels.STEPS
    assert panel["y"] == ["a", "b", "c"] and panel["x"] == [] and panel["ylabel"] == "rows"
    left, top, width, height = (share / 100 for share in panel["box"])
    for row, column in np.argwhere(known):
        down = 2 - row if panel["flip"] else row
        y = (top + height * (down + 0.5) / 3) * pixels.shape[0]
        x = (left + width * (column + 0.5) / 4) * pixels.shape[1]
        colour = image.cmap(image.norm(values[row, column]), bytes=True)[:3]
        assert np.abs(pixels[int(y), int(x)].astype(int) - colour).max() <= 2


def test_a_result_shows_itself_in_a_notebook(made):
    result = load_result(made[0] / f"{STEM}-cka.npz")
    shown = result._repr_html_()
    assert shown.startswith('<img alt="cka of test_vit (random), test_resnet (random)"')
    assert html.escape(result.findings()[0].numbers) in shown


def test_the_grid_has_a_row_a_claim_and_a_column_a_model_or_pair():
    def finding(models, claim, source, verdict, brief=""):
        return Finding(claim, source, verdict, "1 ± 0", brief, models=models.split())

    local = "heads are local"
    # The claims' own words are names of models, too.
    names = ["vit", "vit_b", "cnn", "heads", "is"]
    claims = [
        grid.claim(one, names, "a")
        for one in (
            finding("vit_b", "heads of vit_b are local", "B 2021, Fig. 11", HOLDS, local),
            finding("cnn vit_b", "vit_b is above cnn", "B 2021, Fig. 9, there in colour", FAILS),
            finding("vit cnn", "vit is above cnn", "B 2021, Fig. 9, there in colour", OPEN),
            finding("vit", "heads of vit are local", "B 2021, Fig. 11", FAILS, local),
            finding("vit", "blocks of vit are wide", "B 2021, Fig. 11", HOLDS),
            finding("cnn", "cnn grows", "A 2020, Fig. 1", HOLDS),
        )
    ]
    columns = grid.columns(claims, names)
    assert columns == [("vit",), ("vit_b",), ("cnn",), ("vit_b", "cnn"), ("vit", "cnn")]
    (first, rows), (second, (last,)) = grid.rows(claims, names)
    assert (first, second) == ("B 2021", "A 2020")
    shown = [(row.figure, row.span, row.brief, [[c.sign for c in cell] for cell in row.cells])
             for row in (*rows, last)]  # fmt: skip
    assert shown == [
        ("Fig. 9", 1, "… is above …", [[], [], [], ["✗"], ["?"]]),
        ("Fig. 11", 2, local, [["✗"], ["✓"], [], [], []]),
        ("Fig. 11", 0, "blocks of … are wide", [["✓"], [], [], [], []]),
        ("Fig. 1", 1, "… grows", [[], [], ["✓"], [], []]),
    ]


def test_the_tally_counts_verdicts():
    findings = [Finding("", "", verdict, "") for verdict in (HOLDS, HOLDS, FAILS, OPEN)]
    assert grid.tally(findings) == "Of 4 claims, 2 hold, 1 does not, and 1 is inconclusive."


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CHECK = """<script>
const errors = [], said = {};
window.addEventListener("error", (event) => errors.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
</script>"""
SELF_CHECK = """<script>
const maps = [...document.querySelectorAll("#sheet-cka-0 .map")];
const told = document.getElementById("value-cka-0");
// A page whose window is not in front gets no focus event of its own.
const reach = (map) => { map.focus(); map.dispatchEvent(new FocusEvent("focus")); };
reach(maps[0]); said.focus = told.textContent;
for (const key of ["ArrowUp", "ArrowUp", "ArrowRight"])
  maps[0].dispatchEvent(new KeyboardEvent("keydown", { key }));
said.keys = told.textContent;
const box = maps[2].getBoundingClientRect();
maps[2].dispatchEvent(new PointerEvent("pointermove",
  { clientX: box.left + 0.99 * box.width, clientY: box.top + 0.01 * box.height }));
said.pointer = told.textContent;
reach(document.querySelector("[id^=sheet-skip_ratio] .map"));
said.ratio = document.querySelector("[id^=value-skip_ratio]").textContent;
const cell = document.querySelector(".grid details");
said.closed = cell.querySelector(".told").checkVisibility();
cell.querySelector("summary").click();
said.cell = cell.querySelector(".told").checkVisibility() && cell.querySelector(".told").innerText;
const small = document.querySelector(".thumbs a");
said.figure = document.querySelector(small.getAttribute("href")).tagName;
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.innerHTML = "";
document.body.textContent = "@@" + JSON.stringify({ errors, said, wide, maps: maps.length }) + "@@";
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_cells_tell_their_values(made, tmp_path, width):
    text = text_of(made[0]).replace("<head>", f"<head>{CHECK}", 1).replace("</body>", SELF_CHECK)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(html.unescape(done.stdout.split("@@")[1]))
    assert found["errors"] == [] and not found["wide"] and found["maps"] == 3
    result = load_result(made[0] / f"{STEM}-cka.npz")
    vit, cnn = result.models
    first, said = result.findings()[0], found["said"]
    assert not said["closed"] and said["figure"] == "H2"
    assert said["cell"].startswith(f"{first.verdict}: {first.claim}.")
    assert first.numbers.split("; ")[0] in said["cell"]
    told = {
        "focus": (result.of(vit)[0, 0], "blocks.0 × blocks.0", vit),
        "keys": (result.of(vit)[2, 1], "blocks.2 × blocks.1", vit),
        "pointer": (result.of(vit, cnn)[-1, -1], "blocks.5 × layer4.0", f"{vit} × {cnn}"),
    }
    ratio = load_result(made[0] / f"{STEM}-skip_ratio.npz").ratio[0, 0]
    shown = re.search(r"column 0: ‖z‖ / ‖f\(z\)‖ (\S+)", found["said"]["ratio"])
    assert abs(float(shown[1]) - ratio) <= 5e-3 * ratio
    for how, (value, where, title) in told.items():
        shown = re.fullmatch(rf"{where}: CKA (\S+) \({re.escape(title)}\)", found["said"][how])
        assert shown, found["said"][how]
        assert abs(float(shown[1]) - value) <= 5e-3 * abs(value) + 1e-4
