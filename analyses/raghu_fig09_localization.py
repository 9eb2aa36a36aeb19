"""Raghu et al. 2021, Figure 9: which input patch the last tokens of a ViT are about.

Look for: a token of the ViT, trained with a class token, is most like its own patch (square), a
location of the ResNet's last block like no patch in particular.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b32 resnet50 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import localization

FIGURE = Figure(
    __doc__, __file__, localization, models=["vit_small_box", "resnet_box"], num_images=1024
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
