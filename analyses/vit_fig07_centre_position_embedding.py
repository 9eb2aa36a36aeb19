"""Dosovitskiy et al. 2021, Figure 7 centre: similarity of position embeddings.

Look for: tiles brighten at the patch's own place, and along its row and column; an untrained
table has no such structure.

Nearest to the paper's: --models vit_l32
"""

from gallery import Figure

from vitprobe import position_embedding

FIGURE = Figure(
    __doc__, __file__, position_embedding, models=["vit_small_box", "vit_small_box@random"]
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
