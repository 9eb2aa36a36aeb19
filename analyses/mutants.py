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

import pytest
import sklearn.decomposition
import timm.data
import torchvision.models
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
# What tests need beside the tree, imported once.
IMPORTED = pyplot, sklearn.decomposition, timm.data, torchvision.models
SMALL, KINDS = "tests/test_small_rules.py", "tests/test_options_count.py"
UPRIGHT, KEYS = "tests/test_drawn_upright.py", "tests/test_fingerprint.py"
ELSEWHERE = "tests/test_options_elsewhere.py"
SAFE, TEXTS = "tests/test_nothing_executed.py", "tests/test_escaped.py"
REACHES = f"{KINDS}::test_every_option_of_a_command_reaches_the_measurement"
DRAWN = f"{UPRIGHT}::test_every_measurement_is_drawn_upright_on_one_scale"
NORMS, INFORMATION = "tests/test_token_norms.py", "tests/test_attention_statistics.py"
WAVES, NEAREST = "tests/test_frequency.py", "tests/test_neighbours.py"
PARTS, DROPPED = "tests/test_patch_pca.py", "tests/test_occlusion.py"
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
    Fault("pickles in results", "vitprobe/results/archives.py",
          "allow_pickle=False", "allow_pickle=True", SAFE),
    Fault("pickles in images", "vitprobe/images/arrays.py",
          "with np.load(path, allow_pickle=False)", "with np.load(path, allow_pickle=True)",
          SAFE),
    Fault("pickles in weights", "vitprobe/models/contents.py",
          "allow_pickle=False", "allow_pickle=True", f"{SAFE} -k weights"),
    Fault("pickles in checkpoints", "vitprobe/models/unpickling.py",
          "weights_only=True", "weights_only=False", f"{SAFE} -k weights"),
    Fault("pickles in features", "vitprobe/running/features.py",
          'np.load(path, mmap_mode="r", allow_pickle=False)',
          'np.load(path, mmap_mode="r", allow_pickle=True)', SAFE),
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
    Fault("timm's suffixes stay changed", "vitprobe/images/tars.py",
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
          "Neighbours(layers, k, readout, null, calibrated)\n    return measure_one",
          "Neighbours(layers, k, readout, null)\n    return measure_one",
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
    Fault("missing weights of a network swallowed", "vitprobe/models/fitting.py",
          "if not whole and not network.strict:", "if not whole:", f"{SMALL} -k lacks"),
    # Below: faults of our own choosing, in code that came after those above.
    Fault("least for largest norm", "vitprobe/token_norms.py",
          "+= found.max()", "+= found.min()", NORMS),
    Fault("mean of the batches' largest norms", "vitprobe/token_norms.py",
          'sums["largest"].amax(0)', 'sums["largest"].mean(0)', NORMS),
    Fault("outliers above the median itself", "vitprobe/token_norms.py",
          "share_above(total, self.times * middle)", "share_above(total, middle)", NORMS),
    Fault("last other token is the class token", "vitprobe/token_norms.py",
          "kinds[row, 0] = CLASS", "kinds[row, len(places.without_place) - 1] = CLASS", NORMS),
    Fault("smaller grids end in zeros", "vitprobe/token_norms.py",
          "maps[row, places.rows :], maps[row, :, places.columns :] = np.nan, np.nan", "pass",
          f"{NORMS} -k locations"),
    Fault("norms not checked", "vitprobe/token_norms.py",
          "check_finite(torch.isfinite(found).all(), self.labels[row], model)", "pass",
          f"{NORMS} -k not_finite"),
    Fault("registers claimed to be none", "vitprobe/papers/darcet2024.py",
          "if registers.any() else", "if registers.all() else", f"{NORMS} -k registers"),
    Fault("early outliers asked for", "vitprobe/papers/darcet2024.py",
          "decided(-early[0], early[1], -A_FEW)", "decided(early[0], early[1], -A_FEW)",
          f"{NORMS} -k all_the_way"),
    Fault("quantile of one rank too high", "vitprobe/statistics/log_histogram.py",
          "share * (total - 1).clamp_min(0)", "share * total", f"{NORMS} -k quantiles"),
    Fault("shares off by one bin", "vitprobe/statistics/log_histogram.py",
          "above = (bins + 1 - position[..., None])", "above = (bins - position[..., None])",
          f"{NORMS} -k share_above"),
    Fault("unit of a row forgotten", "vitprobe/token_norms.py",
          "units * log_histogram.quantile(counts, means, one)",
          "log_histogram.quantile(counts, means, one)", "tests/test_scales.py -k digits"),
    Fault("registers for the class token", "vitprobe/attention_statistics.py",
          "[k for k in nowhere if k == of_class]", "[k for k in nowhere if k != of_class]",
          f"{INFORMATION} -k one_by_one"),
    Fault("mass over all queries", "vitprobe/attention_statistics.py",
          "/ self.count", "/ len(from_patches)", f"{INFORMATION} -k one_by_one"),
    Fault("statistics of every block of queries", "vitprobe/attention_statistics.py",
          "if images.stop < len(batch) or queries.stop < layer.queries.shape[1]:",
          "if images.stop < len(batch):", "tests/test_blocks_of_work.py"),
    Fault("arithmetic mean of entropies", "vitprobe/statistics/attention_information.py",
          "(of_queries * of_keys.clamp_min(0)).sqrt()", "((of_queries + of_keys) / 2)",
          f"{INFORMATION} -k dropped_before"),
    Fault("keys that do not count count", "vitprobe/statistics/attention_information.py",
          "to_keys = self.to_keys * self.keys[:, None].to(self.to_keys)",
          "to_keys = self.to_keys", f"{INFORMATION} -k dropped_before"),
    Fault("frequency at Nyquist", "vitprobe/frequency.py",
          "top = below_nyquist(places.rows, places.columns)",
          "top = min(places.rows, places.columns) // 2", f"{WAVES} -k every_sublayer"),
    Fault("steps from the first point", "vitprobe/frequency.py",
          "seen[i] - seen[i - 1]", "seen[i] - seen[0]", f"{WAVES} -k every_sublayer"),
    Fault("error of another quantity", "vitprobe/frequency.py",
          "step_delta_se=step_delta_se", "step_delta_se=step_variance_se",
          f"{WAVES} -k every_sublayer"),
    Fault("channels without a mean kept", "vitprobe/statistics/frequency.py",
          "    nothing |= mean == 0", "    nothing |= mean != mean", f"{WAVES} -k nothing_are"),
    Fault("frequencies of the other side", "vitprobe/statistics/frequency.py",
          "for side in (rows, columns))\n    y, x", "for side in (columns, rows))\n    y, x",
          f"{WAVES} -k numpys"),
    Fault("convolutions are to smooth", "vitprobe/papers/park2022.py",
          'sign = -1 if kind == "attention" else 1', 'sign = -1 if kind != "MLP" else 1',
          "tests/test_noise_alone.py -k smooth"),
    Fault("last other token read out", "vitprobe/neighbours.py",
          "places.rest(tensor)[:, 0].float()", "places.rest(tensor)[:, -1].float()",
          f"{NEAREST} -k scikit_learn"),
    Fault("permutations by no seed", "vitprobe/neighbours.py",
          "permuted_overlap(neighbours, self.asked.null, self.ready.options.seed)",
          "permuted_overlap(neighbours, self.asked.null, 0)",
          f"{KINDS}::test_every_draw_is_by_the_seed"),
    Fault("an image is its own neighbour in later blocks", "vitprobe/statistics/neighbours.py",
          "closeness[torch.arange(len(rows)), rows] = -torch.inf",
          "closeness[torch.arange(len(rows)), torch.arange(len(rows))] = -torch.inf",
          "tests/test_blocks_of_work.py"),
    Fault("votes of equal weight", "vitprobe/statistics/neighbours.py",
          "(cosines / TEMPERATURE - 1 / TEMPERATURE).exp()", "torch.ones_like(cosines)",
          f"{NEAREST} -k leaving_one_out"),
    Fault("error of the mean over n", "vitprobe/neighbours.py",
          "np.sqrt(max(1, told.shape[1] - 1))", "np.sqrt(told.shape[1])", f"{NEAREST} -k labels"),
    Fault("layers hidden by a constant", "vitprobe/statistics/neighbours.py",
          "varying(_spread(wide), wide.mean(0).abs(), rounding)",
          "varying(_spread(wide), wide.abs().amax().expand(wide.shape[1]), rounding)",
          "tests/test_scales.py -k neighbours"),
    Fault("above nothing in place of chance", "vitprobe/papers/huh2024.py",
          'decide(mean, error, chance, result.meta["n"])',
          'decide(mean, error, 0.0, result.meta["n"])', f"{NEAREST} -k findings"),
    Fault("components turned round", "vitprobe/statistics/patch_components.py",
          "(found**3).sum(0) < 0", "(found**3).sum(0) > 0", f"{PARTS} -k sign"),
    Fault("colours from the extremes", "vitprobe/patch_pca.py",
          "known], (1, 99))", "known], (0, 100))", f"{PARTS} -k colours"),
    Fault("objects of any overlap", "vitprobe/patch_pca.py",
          "adaptive_avg_pool2d(shown, size)[:, 0] > 0.5",
          "adaptive_avg_pool2d(shown, size)[:, 0] > 0", f"{PARTS} -k scenes"),
    Fault("all images beside others", "vitprobe/patch_pca.py",
          "return replace(self, first=IMAGES), images, options",
          "return self, images, options", f"{PARTS} -k beside_others"),
    Fault("sign of a component counts", "vitprobe/papers/oquab2023.py",
          "max(auc, 1 - auc)", "auc", f"{PARTS} -k scenes"),
    Fault("accuracy of the clean image throughout", "vitprobe/occlusion.py",
          "(found.cpu() == known)", "(self._clean[m].cpu() == known)", f"{DROPPED} -k labels"),
    Fault("cells drawn by place in the run", "vitprobe/occlusion.py",
          "self.ready.images.order[batch.positions]", "batch.positions",
          f"{DROPPED} -k one_image"),
    Fault("cells rounded down", "vitprobe/statistics/occlusion.py",
          "count = round(share * cells**2)", "count = int(share * cells**2)",
          f"{DROPPED} -k whole_cells"),
    Fault("black is white", "vitprobe/occlusion.py",
          "return -mean / std", "return (1 - mean) / std", f"{DROPPED} -k black"),
    Fault("who keeps more turned round", "vitprobe/papers/naseer2021.py",
          "gap = one - other,", "gap = other - one,", f"{DROPPED} -k findings"),
    Fault("batches counted for images", "vitprobe/running/passes.py",
          'part.counts["n"] += len(batch)', 'part.counts["n"] += 1', "tests/test_measure_all.py"),
    Fault("batches counted for replicates", "vitprobe/running/passes.py",
          "int((watch.used > 0).sum())", "int(watch.used.sum())", f"{SMALL} -k replicates"),
    Fault("batches for the least demanding", "vitprobe/running/passes.py",
          "at_least = max(one.at_least for one in measurements)",
          "at_least = min(one.at_least for one in measurements)",
          "tests/test_measure_all.py -k most_demanding"),
    Fault("prefix counts as places", "vitprobe/extract.py",
          "return spatial.mean(1)", "return tensor.mean(1)", "tests/test_extract.py -k readouts"),
    Fault("precision of a folder not told", "vitprobe/extract.py",
          '        "precision": ready.options.precision,\n', "", f"{ELSEWHERE} -k extract"),
    Fault("--dtype not passed on", "vitprobe/extract.py",
          "readout=args.readout, dtype=args.dtype,", "readout=args.readout,",
          f"{ELSEWHERE} -k extract"),
    Fault("skip and branch mixed up", "vitprobe/tracing/capture.py",
          'skip if layer.point == "skip" else branch', 'branch if layer.point == "skip" else skip',
          "tests/test_activations.py -k sum"),
    Fault("momentum copy as good as the network", "vitprobe/models/fitting.py",
          "return 2 if any(word in place for word in LAST) else 1", "return 1",
          "tests/test_checkpoints.py"),
    Fault("what a file lacks not told", "vitprobe/models/fitting.py",
          "unset=tuple(trial.missing),", "unset=(),", "tests/test_weights_files.py"),
    Fault("merging of patches a stage too early", "vitprobe/models/foreign.py",
          'layers.{int(stage[1]) + 1}.downsample', 'layers.{int(stage[1])}.downsample',
          f"{SMALL} -k transformers"),
    Fault("keys before queries", "vitprobe/models/foreign.py",
          '("query", ("query", "key", "value"))', '("query", ("key", "query", "value"))',
          f"{SMALL} -k transformers"),
    Fault("pooling's query in two parts", "vitprobe/models/foreign.py",
          "[width, 2 * width]", "[2 * width, width]", f"{SMALL} -k transformers"),
    Fault("wrong divisor of HSIC", "vitprobe/statistics/hsic.py",
          "return left @ right.T / (n * (n - 3))", "return left @ right.T / (n * (n - 1))",
          "tests/test_hsic.py"),
    Fault("jackknife as a standard deviation", "vitprobe/statistics/hsic.py",
          "np.sqrt(squares * (len(filled) - 1) / len(filled))",
          "np.sqrt(squares / (len(filled) - 1))", "tests/test_hsic.py -k jackknife"),
    Fault("bootstrap of few groups too small", "vitprobe/statistics/hsic.py",
          "values.std(0, ddof=1) * sqrt(count / (count - 1))", "values.std(0, ddof=1)",
          "tests/test_hsic.py -k bootstrap"),
    Fault("border on one side", "vitprobe/statistics/place_hsic.py",
          "top = (pixels.shape[-2] - rows * height) // 2", "top = 0",
          "tests/test_localization.py -k border"),
    Fault("rows permuted alone", "vitprobe/statistics/permuted_hsic.py",
          "unit[:, order][:, :, order]", "unit[:, order]", "tests/test_chance.py"),
    Fault("worst penalty", "vitprobe/statistics/ridge.py",
          "best = errors.argmin(-1)", "best = errors.argmax(-1)", "tests/test_linear_probe.py"),
    Fault("error of pairs counted once", "vitprobe/statistics/grids.py",
          "np.sqrt(2 * squares * alike.var())", "np.sqrt(squares * alike.var())",
          "tests/test_claims.py -k errors"),
    Fault("areas a pixel too small", "vitprobe/statistics/fields.py",
          "needed = [(mass < share * mass[..., -1:]).sum(-1) + 1 for share in shares]",
          "needed = [(mass < share * mass[..., -1:]).sum(-1) for share in shares]",
          "tests/test_receptive_field.py -k by_hand"),
    Fault("panel of the report upside down", "vitprobe/report/panels.py",
          '"flip": bool(last > first)', '"flip": bool(last < first)',
          "tests/test_report.py -k heat_map"),
    Fault("report without the models left out", "vitprobe/report/command.py",
          'tuple(result.meta.get("without", {}).values())', "()",
          "tests/test_report.py tests/test_labels.py"),
    Fault("images in the order of the folder", "vitprobe/images/sources.py",
          "return images.choose(order[: num_images or available])",
          "return images.choose(np.sort(order[: num_images or available]))",
          "tests/test_images.py"),
    Fault("classes in the order of letters", "vitprobe/images/folders.py",
          "classes = tuple(sorted({top for top in tops if top}, key=natural))",
          "classes = tuple(sorted({top for top in tops if top}))", "tests/test_folders.py"),
    Fault("draws that share images", "vitprobe/images/labelled.py",
          "apart = rows[k * shots : (k + 1) * shots]", "apart = rows[:shots]",
          "tests/test_linear_probe.py -k two_draws"),
    Fault("greys cut off", "vitprobe/images/decoding.py",
          'top = 65535.0 if image.mode.startswith("I")',
          'top = 255.0 if image.mode.startswith("I")',
          "tests/test_images.py -k every_kind"),
    Fault("redraw in the folder of the work", "vitprobe/redraw.py",
          "out = args.out or file.parent", 'out = args.out or Path(".")',
          f"{ELSEWHERE} -k redraw"),
    Fault("--layers of the listing not used", "vitprobe/layer_table.py",
          "table = _table(ready, args.layers)", 'table = _table(ready, "all")',
          f"{ELSEWHERE} -k listing"),
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
    arguments = ["-q", "-x", "-p", "no:cacheprovider", *test.split(" ")]
    paths = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if not hasattr(os, "fork"):
        command = [sys.executable, "-m", "pytest", *arguments]
        return subprocess.run(
            command, cwd=tree, capture_output=True, env={**os.environ, **paths}
        ).returncode
    # A process of its own that has imported all but the tree: that takes longer than most tests.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.environ.update(paths)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        with open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
        os._exit(int(pytest.main(arguments)))
    finally:
        os._exit(3)


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
