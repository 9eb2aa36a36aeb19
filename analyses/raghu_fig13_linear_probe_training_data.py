"""Raghu et al. 2021, Figure 13: linear probes of networks trained on less data.

Look for: what little training data costs high blocks more than low ones.

No such series of the paper is public. With your own:
    --models LITTLE ALL
"""

from gallery import Figure

from vitprobe import linear_probe
from vitprobe.models.loading import bundled_models

LITTLE = [n for n in ("vit_small_box", "resnet_box") if f"{n}_10pct" in bundled_models()]
MODELS = [model for name in LITTLE or ["resnet_box"] for model in (f"{name}_10pct", name)]
FIGURE = Figure(
    __doc__,
    __file__,
    linear_probe,
    note="" if len(LITTLE) == 2 else "one family of networks, on a tenth of the images",
    needs=MODELS,
    models=MODELS,
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
