"""Raghu et al. 2021, Figure 10: localisation with a class token and with averaged tokens.

Look for: the tokens of the ViT that averages them (GAP) are much less localised than those beside
a class token.

No ViT of the paper averages its tokens in public; timm has such:
    --models vit_b16 vit_base_patch16_rpn_224 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import localization

FIGURE = Figure(
    __doc__, __file__, localization, models=["vit_small_box", "vit_gap_box"], num_images=1024
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
