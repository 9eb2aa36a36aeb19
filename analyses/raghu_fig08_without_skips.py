"""Raghu et al. 2021, Figure 8: CKA in a ViT without the skips of one block.

Look for: layers before and after the block (blue lines) are no longer alike.

The paper trains such networks; none of them is public. With your own:
    --models WITH WITHOUT --trained-without BLOCK
"""

from gallery import Figure

from vitprobe import skip_ablation
from vitprobe.models.loading import bundled_models

# Taking skips away from a trained network is another experiment than training without them.
if "vit_small_box_noskip3" in bundled_models():
    FIGURE = Figure(
        __doc__,
        __file__,
        skip_ablation,
        note="trained on without them; the paper's networks are trained so from the start",
        models=["vit_small_box", "vit_small_box_noskip3"],
        trained_without=3,
        num_images=256,
    )
else:
    FIGURE = Figure(
        __doc__,
        __file__,
        skip_ablation,
        note="removed at test time; the paper's networks are trained without",
        models=["vit_small_box"],
        num_images=256,
    )

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
