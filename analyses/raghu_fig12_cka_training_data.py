"""Raghu et al. 2021, Figure 12: CKA with networks trained on less data, block by block.

Look for: networks trained on a part of the images and on all of them are alike in low blocks and
less and less so in high ones.

No such series of the paper is public. With your own, from little to much data:
    --pairwise LITTLE ALL HALF ALL
"""

from gallery import Figure

from vitprobe import cka

LITTLE = [(f"{name}_{share}", name) for name in ("vit_small_box", "resnet_box")
          for share in ("1pct", "10pct")]  # fmt: skip
FIGURE = Figure(
    __doc__,
    __file__,
    cka,
    pairwise=[model for pair in LITTLE for model in pair],
    num_images=1024,
    batch_size=128,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
