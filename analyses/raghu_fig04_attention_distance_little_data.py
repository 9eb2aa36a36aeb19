"""Raghu et al. 2021, Figure 4: attention distance after training on little data.

Look for: a network trained on too little data lacks the local heads in its lowest blocks that the
one trained on all of it has.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_base_patch16_224.augreg_in1k vit_b16 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import attention_distance
from vitprobe.models.loading import bundled_models

ALL = "vit_small_box"
LITTLE = f"{ALL}_10pct"
# Without a network trained on a tenth of the images, the one trained on none stands in for it.
if LITTLE in bundled_models():
    FIGURE = Figure(__doc__, __file__, attention_distance, models=[LITTLE, ALL], num_images=1024)
else:
    FIGURE = Figure(
        __doc__,
        __file__,
        attention_distance,
        note="an untrained network in place of one trained on little",
        models=[f"{ALL}@random", ALL],
        num_images=1024,
    )

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
