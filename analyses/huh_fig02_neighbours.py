"""Huh et al. 2024: which nearest neighbours two networks share, and chance.

Look for: networks that share more neighbours than chance (the line on the colour bar), late layers
most with late ones; and untrained twins, which share the neighbours that pixels make.

Nearest to the paper's, with IMAGES a folder of a thousand:
    --models vit_large_patch14_dinov2 vit_large_patch16_224.mae --images IMAGES --readout class
"""

from gallery import Figure

from vitprobe import neighbours

FIGURE = Figure(
    __doc__,
    __file__,
    neighbours,
    models=["vit_small_box", "resnet_box", "vit_small_box@random", "resnet_box@random"],
    num_images=512,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
