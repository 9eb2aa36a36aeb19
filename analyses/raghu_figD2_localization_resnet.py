"""Raghu et al. 2021, Appendix D: localisation through the blocks of a ResNet.

Look for: an earlier unit is more localised than the last.

Nearest to the paper's, with IMAGENET a folder:
    --models resnet50 --layers blocks --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import localization

# Without the first three blocks, whose large maps would make for a file of a megabyte.
FIGURE = Figure(
    __doc__,
    __file__,
    localization,
    models=["resnet_box"],
    layers=["layer2.1", "layer3.?", "layer4.?"],
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
