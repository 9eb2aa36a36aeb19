"""Raghu et al. 2021, Figure 7: what skips carry against what branches add.

Look for: the class token is carried by the skips in the first half and rewritten in the second,
the spatial tokens the other way round; a ViT's ratios lie above a ResNet's.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b16 resnet50 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import skip_ratio

FIGURE = Figure(__doc__, __file__, skip_ratio, models=["vit_small_box", "resnet_box"])

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
