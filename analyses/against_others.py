"""The package's numbers beside those of other libraries and of timm's own loop.

    pip install -e '.[interop]'
    python analyses/against_others.py                     # a minute
    python analyses/against_others.py --modules all       # each of timm's modules

Statistics are compared on one pair of random matrices, in float64. Of each of timm's modules the
smallest model gives its ``forward_intermediates``, which must be among the layers captured here.
What is not installed is said.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from benchmarking import table
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from torch import Tensor

from vitprobe.patch_embedding import principal_components
from vitprobe.statistics.hsic import biased_cka, cka, gram, hsic, normalise
from vitprobe.statistics.ridge import PENALTIES, ridge
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import map_layers

HERE = Path(__file__).resolve().parent
MODULES = ("vision_transformer", "swin_transformer", "resnet", "convnext", "efficientnet")


def pair() -> tuple[np.ndarray, np.ndarray]:
    """100 rows of 10 features each; the pair that other toolkits publish values of."""
    state = np.random.RandomState(1337)
    x = state.randn(100, 10)
    return x, state.randn(100, 10) + x


def statistics() -> list[tuple[str, str, Callable[[], float], Callable[[Any], float]]]:
    """What, whose package, ours, theirs (given the package)."""
    x, y = pair()
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    batches = list(zip(a.view(4, 25, 10), b.view(4, 25, 10)))

    def minibatch() -> float:
        sums = [hsic(torch.stack([gram(one), gram(other)])) for one, other in batches]
        return float(normalise(torch.stack(sums).sum(0))[0, 1])

    def whitened(library: Any) -> float:
        rdms = [
            library.rdm.calc_rdm(library.data.Dataset(one), method="euclidean") for one in (x, y)
        ]
        return float(library.rdm.compare(*rdms, "cosine_cov").item())

    targets = 2.0 * np.eye(4)[np.arange(100) % 4] - 1
    rows = (x - x.mean(0)) / x.std(0)
    with_constant = torch.from_numpy(np.hstack([rows, np.ones((100, 1))]))
    return [
        ("debiased CKA", "dcor", lambda: cka(a, b),
         lambda library: float(library.u_distance_correlation_sqr(x, y, exponent=2))),
        ("biased CKA", "rsatoolbox", lambda: biased_cka(a, b), whitened),
        ("HSIC₁", "repsim", lambda: float(hsic(torch.stack([gram(a), gram(b)]))[0, 1]),
         lambda library: float(library.hsic([x, y], "linear", "song")[0, 1])),
        ("minibatch CKA", "ckatorch", minibatch,
         lambda library: float(library.cka_batch(a.view(4, 25, 10), b.view(4, 25, 10)))),
        ("penalty of a probe", "sklearn",
         lambda: float(ridge(with_constant, torch.from_numpy(targets))[1]),
         lambda _: float(RidgeCV(PENALTIES.numpy()).fit(rows, targets).alpha_)),
        ("variance of the first component", "sklearn",
         lambda: float(principal_components(x, 5)[1][0]),
         lambda _: float(PCA(5).fit(x).explained_variance_ratio_[0])),
    ]  # fmt: skip


def outside(package: str) -> Any:
    """A package of others; some of them would take this folder's ``coverage`` for theirs."""
    before = sys.path[:]
    sys.path[:] = [folder for folder in before if Path(folder).resolve() != HERE]
    try:
        return import_module(package)
    finally:
        sys.path[:] = before
        sys.modules.pop("coverage", None)


def compared() -> list[tuple[str, ...]]:
    """A row of the table for every statistic."""
    rows = []
    for what, package, ours, theirs in statistics():
        try:
            library = outside(package)
        except ImportError:
            rows.append((what, package, f"{ours():.12f}", "not installed", ""))
            continue
        own, other = ours(), theirs(library)
        rows.append((what, package, f"{own:.12f}", f"{other:.12f}", f"{abs(own - other):.0e}"))
    return rows


def intermediates(module: str) -> tuple[str, ...]:
    """How many of ``forward_intermediates`` of a module's smallest model are among our layers."""
    from coverage import smallest, smallest_side  # not before others have imported theirs

    name, _ = smallest(module)
    side = smallest_side(name)
    torch.manual_seed(0)
    try:
        model = sized(name, side).eval()
        images = torch.randn(2, *timm.get_pretrained_cfg(name).input_size[:1], side, side)
        taken: list[Tensor] = []
        with torch.no_grad():
            layers = map_layers(name, model, images).choose("all")
            with capture(model, layers, lambda _, tensor: taken.append(tensor.clone())):
                model(images)
            theirs = model.forward_intermediates(images, norm=False, intermediates_only=True)
    except Exception as error:  # Whatever a model of timm's raises is a row of the table.
        return module, name, "", f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    found = sum(any(same_map(one, tensor) for tensor in taken) for one in theirs)
    return module, name, str(len(theirs)), str(found)


def sized(name: str, side: int) -> torch.nn.Module:
    """A model for images of a size, told of it where it wants to know."""
    try:
        return timm.create_model(name, img_size=side)
    except TypeError:
        return timm.create_model(name)


def same_map(theirs: Tensor, ours: Tensor) -> bool:
    """Whether a map (n, C, H, W) is what a layer put out, whatever its layout and class tokens."""
    n, channels, rows, columns = theirs.shape
    if ours.ndim == 3 and ours.shape[2] == channels and ours.shape[1] >= rows * columns:
        ours = ours[:, -rows * columns :].mT.reshape(theirs.shape)
    elif ours.shape == (n, rows, columns, channels):
        ours = ours.permute(0, 3, 1, 2)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=MODULES, help="of timm, or all")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(table(("quantity", "package", "here", "there", "difference"), compared()), flush=True)
    modules = timm.list_modules() if args.modules == ["all"] else args.modules
    rows = [intermediates(module) for module in modules]
    print("\n" + table(("module", "model", "intermediates", "among our layers"), rows))


if __name__ == "__main__":
    main()
