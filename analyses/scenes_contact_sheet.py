"""Draw figures/scenes.png: a contact sheet of digit scenes with their labels and digit boxes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from vitprobe.data.scenes import SPLITS, scenes

COLUMNS, ROWS_PER_SPLIT = 12, 2
OUT = Path(__file__).parents[1] / "figures" / "scenes.png"

fig, axes = plt.subplots(
    len(SPLITS) * ROWS_PER_SPLIT, COLUMNS, figsize=(9, 5.4), layout="constrained"
)
for split, rows in zip(SPLITS, axes.reshape(len(SPLITS), -1), strict=True):
    drawn = scenes(len(rows), split=split)
    for ax, image, label, place in zip(rows, drawn.images, drawn.labels, drawn.place, strict=True):
        top, left, height, width = place
        ax.imshow(image, interpolation="nearest", extent=(0, 32, 32, 0))
        ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="w", lw=0.4))
        ax.set_title(label, fontsize=7, pad=1.5)
        ax.set_xticks([])
        ax.set_yticks([])
for split, row in zip(SPLITS, axes[::ROWS_PER_SPLIT], strict=True):
    row[0].set_ylabel(split, fontsize=8)
OUT.parent.mkdir(exist_ok=True)
fig.savefig(OUT, dpi=110, pil_kwargs={"optimize": True})
print(OUT)
