"""Raghu et al. 2021, Figure C.1: receptive fields through all layers of a ViT.

Look for: the jump from local to global comes with the first attention; after each residual sum
the own patch stands out again.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b32 --images IMAGENET --num-images 32 --channels all
"""

from gallery import Figure

from vitprobe import receptive_field

FIGURE = Figure(__doc__, __file__, receptive_field, models=["vit_small_box"], layers="paper")

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
