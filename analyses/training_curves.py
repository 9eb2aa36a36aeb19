"""Draw figures/training_curves.png: loss and test accuracy against images seen.

    python analyses/training_curves.py RUNS   # from the logs that train_family.py left in RUNS
    python analyses/training_curves.py        # again from figures/training_curves.npz

The npz holds one (checkpoints, 3) array per network: images seen, mean training loss since the row
before (nats), accuracy on the first 1,000 test scenes.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

STEM = Path(__file__).parents[1] / "figures" / "training_curves"

if len(sys.argv) > 1:
    curves = {}
    for log in sorted(Path(sys.argv[1]).glob("*/log.jsonl")):
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        keys = ("pictures_seen", "loss", "test_accuracy")
        curves[log.parent.name] = np.array([[entry[key] for key in keys] for entry in entries])
    np.savez_compressed(STEM.with_suffix(".npz"), **curves)
else:
    curves = dict(np.load(STEM.with_suffix(".npz")))

fig, (loss_ax, accuracy_ax) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, (pictures_seen, loss, accuracy) in ((name, curve.T) for name, curve in curves.items()):
    loss_ax.plot(pictures_seen / 1000, loss, label=name)
    accuracy_ax.plot(pictures_seen / 1000, 100 * accuracy)
loss_ax.set(xlabel="images seen (thousands)", ylabel="training loss (nats)", ylim=(0, None))
accuracy_ax.set(xlabel="images seen (thousands)", ylabel="test accuracy (%)", ylim=(0, 100))
accuracy_ax.axhline(10, color="0.6", lw=0.8, ls=":")
fig.legend(*loss_ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
fig.savefig(STEM.with_suffix(".png"), dpi=110, pil_kwargs={"optimize": True})
print(STEM.with_suffix(".png"))
