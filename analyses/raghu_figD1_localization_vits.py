"""Raghu et al. 2021, Appendix D: localisation through all blocks of two ViTs.

Look for: how the place is lost with depth (right), sooner where tokens are averaged than beside a
class token.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b32 vit_l16 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import localization

FIGURE = Figure(
    __doc__, __file__, localization, models=["vit_small_box", "vit_gap_box"], layers="blocks"
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
