"""Raghu et al. 2021, Figure 13: linear probes of networks trained on less data.

Look for: what little training data costs high blocks more than low ones.

No such series of the paper is public. With your own:
    --models LITTLE ALL
"""

from gallery import Figure

from vitprobe import linear_probe

FIGURE = Figure(
    __doc__,
    __file__,
    linear_probe,
    models=[f"{name}{share}" for name in ("vit_small_box", "resnet_box")
            for share in ("_1pct", "_10pct", "")],
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
