"""Park et al. 2023, Figure 3: how much the attention of each head depends on the query.

Look for: the mutual information of query and key near 0 in late layers of contrastively trained
networks, whose attention collapses, and higher in those trained on masked images.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_base_patch16_224.dino vit_base_patch16_224.mae --images IMAGENET
"""

from gallery import Figure

from vitprobe import attention_statistics

FIGURE = Figure(
    __doc__, __file__, attention_statistics, models=["vit_small_box", "vit_gap_box"], num_images=512
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
