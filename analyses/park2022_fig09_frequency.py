"""Park & Kim 2022, Figures 8 and 9: what sublayers do to frequencies and variance.

Look for: attention lowers both the amplitude of high frequencies and the variance of maps, MLPs and
convolutions raise both.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_tiny_patch16_224 resnet50 --images IMAGENET --num-images 1000
"""

from gallery import Figure

from vitprobe import frequency

FIGURE = Figure(
    __doc__, __file__, frequency, models=["vit_small_box", "resnet_box"], num_images=512
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
