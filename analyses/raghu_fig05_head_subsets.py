"""Raghu et al. 2021, Figure 5: which heads of the first block do what a ResNet does.

Look for: lines fall from left to right, as the more local heads are more like the ResNet's lowest
layers; Spearman's rho close to -1 for each of them.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 resnet50 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import head_subsets

FIGURE = Figure(
    __doc__, __file__, head_subsets, models=["vit_small_box", "resnet_box"], num_images=1024
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
