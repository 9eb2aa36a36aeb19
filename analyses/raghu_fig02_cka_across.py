"""Raghu et al. 2021, Figure 2: CKA between all layers of ViTs and a ResNet.

Look for: the lower half of the ResNet is most like the lowest quarter or third of a ViT; the
ViT's last third is unlike every layer of the ResNet. The panels beside the diagonal compare two
networks each.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 vit_h14 resnet50 --images IMAGENET --num-images 10240 --batch-size 1024
"""

from gallery import Figure

from vitprobe import cka

FIGURE = Figure(
    __doc__,
    __file__,
    cka,
    models=["vit_small_box", "vit_gap_box", "resnet_box"],
    layers="paper",
    num_images=1024,
    batch_size=128,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
