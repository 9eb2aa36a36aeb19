"""Raghu et al. 2021, Figure 13: linear probes of networks trained on less data.

Look for: what little training data costs high blocks more than low ones.

No such series of the paper is public. With your own:
    --models LITTLE ALL
"""

from gallery import Figure

from vitprobe import linear_probe

MODELS = ["vit_small_box_10pct", "vit_small_box", "resnet_box_10pct", "resnet_box"]
FIGURE = Figure(__doc__, __file__, linear_probe, needs=MODELS, models=MODELS)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
