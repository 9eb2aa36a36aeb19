"""Raghu et al. 2021, Figure 12: CKA with networks trained on less data, block by block.

Look for: networks trained on a tenth of the images and on all of them are alike in low blocks
and less and less so in high ones.

No such series of the paper is public. With your own, from little to much data:
    --pairwise LITTLE ALL HALF ALL
"""

from gallery import Figure

from vitprobe import cka
from vitprobe.models.loading import bundled_models

LITTLE = [n for n in ("vit_small_box", "resnet_box") if f"{n}_10pct" in bundled_models()]
PAIRS = [model for name in LITTLE or ["resnet_box"] for model in (f"{name}_10pct", name)]
FIGURE = Figure(
    __doc__,
    __file__,
    cka,
    note="" if len(LITTLE) == 2 else "one family of networks, on a tenth of the images",
    needs=PAIRS,
    pairwise=PAIRS,
    num_images=1024,
    batch_size=128,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
