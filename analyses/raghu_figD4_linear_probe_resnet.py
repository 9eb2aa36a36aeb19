"""Raghu et al. 2021, Figure D.4: linear probes with all readouts, a ResNet beside the ViTs.

Look for: the mean over locations is the ResNet's best readout at its last block, as it is what
the ResNet was trained with.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b32 resnet50 --images TRAIN --test-images IMAGENET
"""

from gallery import Figure

from vitprobe import linear_probe

FIGURE = Figure(
    __doc__, __file__, linear_probe, models=["vit_small_box", "vit_gap_box", "resnet_box"]
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
