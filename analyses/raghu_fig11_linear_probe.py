"""Raghu et al. 2021, Figure 11: linear probes with a class token and with averaged tokens.

Look for: at the last block spatial tokens probe far better where tokens are averaged (GAP) than
beside a class token, which becomes useful late; each network's own readout is its best.

No ViT of the paper averages its tokens in public; timm has such:
    --models vit_b32 vit_base_patch16_rpn_224 --images TRAIN --test-images IMAGENET
"""

from gallery import Figure

from vitprobe import linear_probe

FIGURE = Figure(__doc__, __file__, linear_probe, models=["vit_small_box", "vit_gap_box"])

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
