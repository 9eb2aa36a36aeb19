"""Raghu et al. 2021, Figure 1: CKA between all layers within a ViT and a ResNet.

Look for: the ViT's map is even, its lowest and highest layers still alike; the ResNet's falls
apart into stages. Both axes from input (lower left) to output. The third panel compares the two
(Figure 2).

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 resnet50 --images IMAGENET --num-images 10240 --batch-size 1024
"""

from gallery import Figure

from vitprobe import cka

FIGURE = Figure(
    __doc__,
    __file__,
    cka,
    models=["vit_small_box", "resnet_box"],
    layers="paper",
    num_images=1024,
    batch_size=128,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
