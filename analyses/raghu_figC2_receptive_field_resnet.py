"""Raghu et al. 2021, Figure C.2: receptive fields through all layers of a ResNet.

Look for: a field that grows gradually and stays far inside its theoretical one (white box).

Nearest to the paper's, with IMAGENET a folder:
    --models resnet50 --images IMAGENET --num-images 32 --channels all
"""

from gallery import Figure

from vitprobe import receptive_field

FIGURE = Figure(__doc__, __file__, receptive_field, models=["resnet_box"], layers="paper")

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
