"""Naseer et al. 2021, Figures 2 and 8: predictions on dropped and shuffled images.

Look for: the ViT keeps more of its predictions than the CNN when half of the image is dropped, and
when its cells are shuffled.

Nearest to the paper's, with IMAGENET a folder of class folders:
    --models deit_small_patch16_224 resnet50 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import occlusion

FIGURE = Figure(
    __doc__, __file__, occlusion, models=["vit_small_box", "resnet_box"], num_images=512
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
