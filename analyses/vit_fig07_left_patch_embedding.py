"""Dosovitskiy et al. 2021, Figure 7 left: principal components of the patch embedding.

Look for: leading components are smooth, of low frequency and colour-opponent; those of an
untrained embedding are white noise.

Nearest to the paper's: --models vit_l32
"""

from gallery import Figure

from vitprobe import patch_embedding

FIGURE = Figure(
    __doc__, __file__, patch_embedding, models=["vit_small_box", "vit_small_box@random"]
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
