"""Raghu et al. 2021, Figure C.3: receptive fields through all layers of a second ViT.

Look for: the same course as in Figure C.1. The paper's second ViT is a larger one; here it is the
one that averages its tokens.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 --images IMAGENET --num-images 32 --channels all
"""

from gallery import Figure

from vitprobe import receptive_field

FIGURE = Figure(
    __doc__,
    __file__,
    receptive_field,
    note="the ViT that averages its tokens, not a larger one",
    models=["vit_gap_box"],
    layers="paper",
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
