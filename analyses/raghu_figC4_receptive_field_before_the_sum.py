"""Raghu et al. 2021, Figure C.4: receptive fields of a ViT before the residual sums.

Look for: what attention alone adds is less centred on its own patch than the sum that it goes
into: the skips keep tokens at their place.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b32 --images IMAGENET --num-images 32 --channels all
"""

from gallery import Figure

from vitprobe import receptive_field

FIGURE = Figure(__doc__, __file__, receptive_field, models=["vit_small_box"], pre_residual=True)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
