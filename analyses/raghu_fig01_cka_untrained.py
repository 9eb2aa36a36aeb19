"""Raghu et al. 2021, Figure 1, before training: CKA within untrained twins.

Look for: what of Figure 1 is there without training: an untrained network's layers are alike for
as long as nothing but random maps lies between them.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16@random resnet50@random --images IMAGENET --num-images 10240 --batch-size 1024
"""

from gallery import Figure

from vitprobe import cka

FIGURE = Figure(
    __doc__,
    __file__,
    cka,
    models=["vit_small_box@random", "resnet_box@random"],
    layers="paper",
    num_images=1024,
    batch_size=128,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
