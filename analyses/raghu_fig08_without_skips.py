"""Raghu et al. 2021, Figure 8: CKA in a ViT trained without the skips of one block.

Look for: layers before and after the block (blue lines) are no longer alike.

None of the paper's networks is public. With your own, each without the skips of one block:
    --models WITH WITHOUT WITHOUT ... --trained-without BLOCK BLOCK ...
"""

from gallery import Figure

from vitprobe import skip_ablation

BLOCKS = [1, 3, 5]
FIGURE = Figure(
    __doc__,
    __file__,
    skip_ablation,
    note="with as many labels these have learnt less than the whole one",
    models=["vit_small_box", *(f"vit_small_box_noskip{block}" for block in BLOCKS)],
    trained_without=BLOCKS,
    num_images=256,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
