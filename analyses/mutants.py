"""Faults of one line each, and the test that is to notice each of them.

    python analyses/mutants.py [--only WORD ...]

Each fault is put into a copy of the tree, alone, and the test named is run there. It prints for
each *caught* or NOT CAUGHT; FAILS ANYWAY where the test fails without the fault too; and MOVED
where the line no longer stands as it is written here: then the fault is to be written anew, or
the code that it was about is gone. Not part of CI.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL, KINDS = "tests/test_small_rules.py", "tests/test_options_count.py"
UPRIGHT, KEYS = "tests/test_drawn_upright.py", "tests/test_fingerprint.py"
SAFE, TEXTS = "tests/test_nothing_executed.py", "tests/test_escaped.py"
REACHES = f"{KINDS}::test_every_option_of_a_command_reaches_the_measurement"
DRAWN = f"{UPRIGHT}::test_every_measurement_is_drawn_upright_on_one_scale"
SIGNALS = f"{SMALL}::test_a_second_signal_at_once_leaves_the_batch_whole"
FILES = f"{SMALL}::test_a_file_is_replaced_whole_and_as_readable_as_others"


@dataclass(frozen=True)
class Fault:
    """``old``, which stands once in ``file`` of the project, becomes ``new``; ``test`` fails."""

    name: str
    file: str
    old: str
    new: str
    test: str


FAULTS = [
    Fault("arithmetic mean of penalties", "vitprobe/running/probes.py",
          "np.exp(logs.mean(0))", "np.exp(logs).mean(0)", f"{SMALL} -k penalty"),
    Fault("depth of the best match", "vitprobe/papers/raghu2021/alike.py",
          "best.double().mean() / (cross.shape[0] - 1)", "best.double().mean() / cross.shape[0]",
          f"{SMALL} -k depth_one"),
    Fault("greatest gap", "vitprobe/papers/raghu2021/alike.py",
          "gaps[~gaps.isnan()].min()", "gaps[~gaps.isnan()].max()", f"{SMALL} -k late_gap"),
    Fault("layer missing in a later pass", "vitprobe/tracing/capture.py",
          "seen.clear()", "pass", f"{SMALL} -k later_pass"),
    Fault("NaN for a row all masked out", "vitprobe/tracing/attention_operations.py",
          "masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)",
          "masked_fill(~mask, -torch.inf).softmax(-1)", f"{SMALL} -k masked_out"),
    Fault("pooling without its stride", "vitprobe/tracing/reach_windows.py",
          '("norm_type",) * lp + ("kernel_size", "stride")',
          '("norm_type",) * lp + ("kernel_size", "padding")', "tests/test_theoretical_field.py"),
    Fault("field starts at the image's edge", "vitprobe/tracing/theoretical_field.py",
          "box = -top, -left, bottom, right", "box = 0, -left, bottom, right",
          "tests/test_theoretical_field.py"),
    Fault("resume ignores the precision", "vitprobe/running/session.py",
          '            "precision": options.precision,\n', "", KEYS),
    Fault("resume ignores the device", "vitprobe/running/session.py",
          '"precision": options.precision,\n            "device": self.device.type,',
          '"precision": options.precision,', KEYS),
    Fault("resume ignores the seed", "vitprobe/running/session.py",
          '            "seed": options.seed,\n', "", KEYS),
    Fault("resume ignores versions", "vitprobe/running/session.py",
          '            "versions": versions(),\n', "", KEYS),
    Fault("resume ignores images rewritten", "vitprobe/running/session.py",
          "[self.images.digest, self.images.version]", "[self.images.digest]", KEYS),
    Fault("stops at exactly 1 % of broken images", "vitprobe/running/loop.py",
          "if count > BROKEN_FRACTION_ALLOWED * n", "if count >= BROKEN_FRACTION_ALLOWED * n",
          f"{SMALL} -k hundred"),
    Fault("pickles in states", "vitprobe/running/checkpoint.py",
          "allow_pickle=False", "allow_pickle=True", f"{SAFE} -k state"),
    Fault("pickles in results", "vitprobe/results/reading.py",
          "allow_pickle=False", "allow_pickle=True", f"{SAFE} -k result"),
    Fault("pickles in images", "vitprobe/images/arrays.py",
          "with np.load(path, allow_pickle=False)", "with np.load(path, allow_pickle=True)",
          SAFE),
    Fault("pickles in weights", "vitprobe/models/contents.py",
          "allow_pickle=False", "allow_pickle=True", f"{SAFE} -k weights"),
    Fault("pickles in checkpoints", "vitprobe/models/unpickling.py",
          "weights_only=True", "weights_only=False", f"{SAFE} -k weights"),
    Fault("pickles in features", "vitprobe/running/features.py",
          "with np.load(path, allow_pickle=False)", "with np.load(path, allow_pickle=True)",
          f"{SAFE} -k features"),
    Fault("files not replaced whole", "vitprobe/results/writing.py",
          "os.replace(temporary, path)", "path.write_bytes(Path(temporary).read_bytes())", FILES),
    Fault("files of their owner only", "vitprobe/results/writing.py",
          "os.chmod(temporary, 0o666 & ~mask)", "os.chmod(temporary, 0o600)", FILES),
    Fault("second signal tears a batch", "vitprobe/running/interrupts.py",
          "now - self._first > AGAIN_S", "now - self._first > 0", SIGNALS),
    Fault("device not restored", "vitprobe/running/devices.py",
          "if home is not None and home != device:", "if False:", f"{SMALL} -k their_device"),
    Fault("used memory of a container counts as free", "vitprobe/running/memory.py",
          "limit - used + cached", "limit", f"{SMALL} -k container"),
    Fault("seed of an untrained bundled network", "vitprobe/models/loading.py",
          "torch.manual_seed(seed)\n        module = build(",
          "torch.manual_seed(0)\n        module = build(", f"{SMALL} -k by_the_seed"),
    Fault("raw weights before averaged ones", "vitprobe/models/fitting.py",
          "            return 0\n        return 2", "            return 1\n        return 2",
          f"{SMALL} -k averaged"),
    Fault("timm's suffixes stay changed", "vitprobe/images/sources.py",
          "set_img_extensions(before)", "pass", f"{SMALL} -k timm"),
    Fault("test labels in their own order", "vitprobe/images/labelled.py",
          "labels=place[test.labels]", "labels=test.labels", f"{SMALL} -k matched_by_name"),
    Fault("undefined is 0", "vitprobe/results/result.py",
          "if math.isfinite(value) else None", "if math.isfinite(value) else 0.0",
          f"{SMALL} -k null"),
    Fault("notebook not escaped", "vitprobe/results/result.py",
          "{html.escape(cell)}", "{cell}", TEXTS),
    Fault("alternative text not escaped", "vitprobe/results/result.py",
          'alt="{html.escape(name)}"', 'alt="{name}"', TEXTS),
    Fault("page not escaped", "vitprobe/report/page.py",
          "autoescape=True", "autoescape=False", TEXTS),
    Fault("script can be closed", "vitprobe/report/page.py",
          '.replace("<", "\\\\u003c")', "", TEXTS),
    Fault("tables rounded", "vitprobe/results/tables.py",
          "written = float if name in MEASURED",
          "written = (lambda v: round(v, 4)) if name in MEASURED",
          f"{SMALL} -k digits"),
    Fault("SVG with its date", "vitprobe/results/drawing.py",
          '"svg": {"Date": None}', '"svg": {}', f"{SMALL} -k svg"),
    Fault("tally turned round", "vitprobe/report/grid.py",
          "{count[FAILS]} {'do'", "{count[HOLDS]} {'do'", f"{SMALL} -k tally"),
    Fault("report keeps what was asked otherwise", "vitprobe/report/command.py",
          '            "measurement": repr(measurement),\n', "", f"{SMALL} -k otherwise"),
    Fault("scale of each CKA panel", "vitprobe/cka.py",
          "low = min(0.0, float(np.nanmin(self.cka)))",
          "low = min(0.0, float(np.nanmin(self.cka[np.ix_(rows, columns)])))", UPRIGHT),
    Fault("scale of each localisation", "vitprobe/localization.py",
          "self._token_maps(row, layer, scale)",
          "self._token_maps(row, layer, self._scale([layer]))", UPRIGHT),
    Fault("probes upside down", "vitprobe/linear_probe.py",
          "axes[1, m].invert_yaxis()", "pass", f"{DRAWN}[linear_probe]"),
    Fault("localisation upside down", "vitprobe/localization.py",
          "ax.invert_yaxis()", "pass", f"{DRAWN}[localization]"),
    Fault("fields upside down", "vitprobe/results/field_figure.py",
          "ylim=(len(field) - 0.5, -0.5)", "ylim=(-0.5, len(field) - 0.5)",
          f"{DRAWN}[receptive_field]"),
    Fault("--renormalise not passed on", "vitprobe/cli.py",
          "chosen = {one.name: getattr(args, one.name) for one in own}",
          "chosen = {one.name: one.default for one in own}", REACHES),
    Fault("--signed not passed on", "vitprobe/receptive_field.py",
          "signed=args.signed,", "signed=False,", f"{REACHES}[receptive_field]"),
    Fault("--precision not passed on", "vitprobe/cli.py",
          '"image_size", "device", "precision", "seed"', '"image_size", "device", "seed"', REACHES),
    Fault("--calibrated dropped by measure", "vitprobe/neighbours.py",
          "Neighbours(layers, k, readout, null, calibrated)",
          "Neighbours(layers, k, readout, null)",
          f"{REACHES}[neighbours]"),
    Fault("--times not used", "vitprobe/token_norms.py",
          "TokenNorms(layers, times)", "TokenNorms(layers)", f"{REACHES}[token_norms]"),
    Fault("--title not kept", "vitprobe/cli.py",
          'result.meta["title"] = shown(args.title)', "pass", f"{KINDS} -k output"),
    Fault("--format not used", "vitprobe/cli.py",
          "result.save(args.out / name, args.format)", "result.save(args.out / name)",
          f"{KINDS} -k output"),
    Fault("highest in place of lowest layers", "vitprobe/head_subsets.py",
          "[:LOWEST]", "[-LOWEST:]", f"{SMALL} -k lowest"),
    Fault("verdict on noise", "vitprobe/papers/dosovitskiy2021.py",
          "decide(-value, 0.0, -SMOOTH)", "decide(value, 0.0, -SMOOTH)", f"{SMALL} -k noise"),
    Fault("bias with its mean", "vitprobe/position_embedding.py",
          "shown = shown - np.nansum(shown, (2, 3), keepdims=True) / count",
          "shown = shown + 0 / count", f"{SMALL} -k bias"),
    Fault("convolutions of one pixel", "vitprobe/tracing/branches.py",
          "max(part.kernel_size) > 1", "max(part.kernel_size) > 0", f"{SMALL} -k one_pixel"),
    Fault("ratios halved", "analyses/benchmarking.py",
          "[2 * t / (a + b)", "[t / (a + b)", f"{SMALL} -k ratio"),
    Fault("broken models are without it", "analyses/coverage.py",
          "status = ABSENT if SAYS_ABSENT.search(str(error)) else NO", "status = ABSENT",
          f"{SMALL} -k broken_model"),
    Fault("augmentation ignores the seed", "analyses/training_stages.py",
          "default_rng([options.seed, step])", "default_rng([step])",
          "tests/test_train_family.py -k by_the_seed"),
    Fault("loss on all patches", "analyses/masked_images.py",
          "unseen.scatter_(1, kept, False)", "pass", "tests/test_masked_images.py -k left_out"),
    Fault("masks not of the step", "analyses/training_stages.py",
          "torch.manual_seed(int(", "(int(", "tests/test_masked_images.py -k interrupted"),
]  # fmt: skip


def outcome(fault: Fault, tree: Path) -> str:
    """``caught``, ``NOT CAUGHT`` or ``MOVED``; the tree is as before afterwards."""
    path = tree / fault.file
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before.count(fault.old) != 1:
        return f"MOVED ({before.count(fault.old)} times in {fault.file})"
    if status(fault.test, tree):
        return "FAILS ANYWAY"
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        found = run(fault.test, tree)
    finally:
        path.write_text(before, encoding="utf-8")
    # A test that cannot be collected any more has noticed nothing of the fault's kind.
    return {0: "NOT CAUGHT", 1: "caught"}.get(found, f"NO TEST RUN (pytest ended with {found})")


@cache
def status(test: str, tree: Path) -> int:
    """How a test ends without any fault."""
    return run(test, tree)


def run(test: str, tree: Path) -> int:
    """How pytest ends: 0 where all passed, 1 where a test failed."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    paths = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *test.split(" ")], cwd=tree, capture_output=True, env={**os.environ, **paths}
    ).returncode


def main() -> int:
    """1 where a fault was let through or could not be tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words in the names of faults")
    args = parser.parse_args()
    chosen = [one for one in FAULTS if any(word in one.name for word in args.only)]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        leave_out = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "vitprobe-out")
        shutil.copytree(ROOT, tree, ignore=leave_out)
        for fault in chosen:
            told = outcome(fault, tree)
            caught += told == "caught"
            print(f"{told:12} {fault.name} ({fault.file}; {fault.test})", flush=True)
    print(f"{caught} of {len(chosen)} caught.")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
