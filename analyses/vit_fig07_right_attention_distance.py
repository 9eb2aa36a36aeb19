"""Dosovitskiy et al. 2021, Figures 7 right and 11: attention distance against depth.

Look for: some heads of low layers are local, others global already; distance grows with depth.
The untrained twin attends uniformly everywhere.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 hybrid_r50_b16 --images IMAGENET --num-images 128
"""

from gallery import Figure

from vitprobe import attention_distance

FIGURE = Figure(
    __doc__,
    __file__,
    attention_distance,
    models=["vit_small_box", "vit_small_box@random"],
    num_images=128,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
