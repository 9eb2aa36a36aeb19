"""Raghu et al. 2021, Figure 4: attention distance after training on little data.

Look for: a network trained on too little data lacks the local heads in its lowest blocks that the
one trained on all of it has.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_base_patch16_224.augreg_in1k vit_b16 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import attention_distance

FIGURE = Figure(
    __doc__,
    __file__,
    attention_distance,
    models=["vit_small_box_1pct", "vit_small_box_10pct", "vit_small_box"],
    num_images=1024,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
