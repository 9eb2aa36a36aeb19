"""Draw figures/training_curves.png: losses and test accuracy against images seen.

    python analyses/training_curves.py RUNS   # from the logs that train_family.py left in RUNS
    python analyses/training_curves.py        # again from figures/training_curves.npz

The npz holds one (checkpoints, 3) array per network: images seen, mean training loss since the row
before (nats), accuracy on the first 1,000 test scenes. NAME_masked is its stage of masked images:
images seen, mean training loss and loss on the same test scenes (squared error of normalised
pixels). A network without a log in RUNS keeps its curve.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

STEM = Path(__file__).parents[1] / "figures" / "training_curves"
LOGS = {"log": ("", "test_accuracy"), "masked": ("_masked", "test_loss")}


def read_logs(runs: Path) -> dict[str, np.ndarray]:
    """The arrays of the npz, of all networks with a log."""
    found = {}
    for stem, (suffix, tested) in LOGS.items():
        for log in sorted(runs.glob(f"*/{stem}.jsonl")):
            entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            keys = ("pictures_seen", "loss", tested)
            rows = [[entry[key] for key in keys] for entry in entries]
            found[f"{log.parent.name}{suffix}"] = np.array(rows)
    return found


def draw(curves: dict[str, np.ndarray]) -> plt.Figure:
    """A panel for the masked stage, where there is one, and two for the stage of labels."""
    names = [name for name in curves if not name.endswith("_masked")]
    colours = dict(zip(names, plt.get_cmap("tab10").colors))
    masked = {name: curves[f"{name}_masked"] for name in names if f"{name}_masked" in curves}
    fig, axes = plt.subplots(1, 3 if masked else 2, figsize=(13 if masked else 9, 3.4),
                             layout="constrained")  # fmt: skip
    for name, (seen, loss, tested) in ((name, curve.T) for name, curve in masked.items()):
        axes[0].plot(seen / 1000, loss, color=colours[name])
        axes[0].plot(seen / 1000, tested, color=colours[name], ls=":")
    for name in names:
        seen, loss, accuracy = curves[name].T
        axes[-2].plot(seen / 1000, loss, color=colours[name], label=name)
        axes[-1].plot(seen / 1000, 100 * accuracy, color=colours[name])
    if masked:
        axes[0].set(xlabel="images seen (thousands)", ylabel="masked loss (dotted: on test scenes)")
    axes[-2].set(xlabel="labels seen (thousands)", ylabel="training loss (nats)", ylim=(0, None))
    axes[-1].set(xlabel="labels seen (thousands)", ylabel="test accuracy (%)", ylim=(0, 100))
    axes[-1].axhline(10, color="0.6", lw=0.8, ls=":")
    fig.legend(*axes[-2].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return fig


def main(arguments: list[str], stem: Path = STEM) -> None:
    npz = stem.with_suffix(".npz")
    curves = dict(np.load(npz)) if npz.is_file() else {}
    if arguments:
        new = read_logs(Path(arguments[0]))
        # What was trained anew by other stages leaves none of its old ones.
        trained = {name.removesuffix("_masked") for name in new}
        curves = {k: v for k, v in curves.items() if k.removesuffix("_masked") not in trained}
        curves |= new
        np.savez_compressed(npz, **curves)
    png = stem.with_suffix(".png")
    draw(curves).savefig(png, dpi=110, pil_kwargs={"optimize": True})
    print(png)


if __name__ == "__main__":
    main(sys.argv[1:])
