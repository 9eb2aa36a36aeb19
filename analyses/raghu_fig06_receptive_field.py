"""Raghu et al. 2021, Figure 6: effective receptive fields of a ViT and a ResNet.

Look for: the ResNet's field grows layer by layer; the ViT's lowest layers already reach farther,
and from half depth on it is global around a dominant centre patch.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b32 resnet50 --images IMAGENET --num-images 32 --channels all
"""

from gallery import Figure

from vitprobe import receptive_field

FIGURE = Figure(__doc__, __file__, receptive_field, models=["vit_small_box", "resnet_box"])

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
