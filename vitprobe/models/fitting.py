"""A network's weights found in a file: by fit, never by a guess.

A file may hold several networks (an average beside the weights, a teacher beside a student), under
any prefix, in a layout that timm converts. A dict of tensors and a prefix are taken where every
tensor that the network needs is found there; where none has them all, the nearest is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, bfloat16, equal, float16, zeros

from vitprobe.errors import VitprobeError
from vitprobe.models.contents import Contents, state_dicts
from vitprobe.models.foreign import rename, written_by
from vitprobe.models.names import ALIASES
from vitprobe.models.places import resampled, resized_weight
from vitprobe.models.reference import Reference

# Of several networks in a file that fit, averages and teachers are what papers evaluate, and the
# momentum copy of a contrastive method is not.
PREFERRED = ("ema", "teacher", "averaged", "average", "swa")
LAST = ("student", "momentum", "encoder_k")
# Prefixes tried with a layout that timm converts; below this share of the tensors it is none.
TRIED, SHARE = 6, 0.5
SHOWN = 3


@dataclass(frozen=True)
class Fit:
    """A file's weights as the network takes them.

    Attributes:
        state: by the network's names, with its shapes.
        num_classes: of the file's classifier, 0 where it has none.
        where: dotted path of the dict in the file, empty for the file itself.
        prefix: under which the network's names are.
        others: where else in the file such networks are.
        left_out: names of the file's tensors in that dict that the network has no use for.
        resampled: position table -> from and to.
        layout: which library's layout has been converted, empty for timm's own.
        unset: names of the network's tensors that the file does not hold and timm does not ask for.
    """

    state: dict[str, Tensor]
    num_classes: int
    where: str = ""
    prefix: str = ""
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    resampled: Mapping[str, str] = field(default_factory=dict)
    layout: str = ""
    unset: tuple[str, ...] = ()

    def details(self) -> dict[str, Any]:
        """For provenance."""
        said = {
            "taken_from": self.where,
            "prefix": self.prefix,
            "other_networks": list(self.others),
            "left_out": list(self.left_out),
            "resampled": dict(self.resampled),
            "layout": self.layout,
            "unset": list(self.unset),
        }
        return {key: value for key, value in said.items() if value}

    def said(self) -> str:
        """For captions: whatever is not as plain as weights in a file."""
        parts = []
        if self.others:
            parts.append(f"taken from {_place(self.where, self.prefix)}, not {_some(self.others)}")
        elif self.prefix:
            parts.append(f"taken from {_place(self.where, self.prefix)}")
        if self.layout:
            parts.append(f"converted from {self.layout}")
        parts += [f"{name} resampled {sizes}" for name, sizes in list(self.resampled.items())[:1]]
        if len(self.resampled) > 1:
            parts[-1] += f" (and {len(self.resampled) - 1} more)"
        if self.left_out:
            parts.append(f"left out: {_some(_groups(self.left_out))}")
        if self.unset:
            parts.append(f"not in the file: {_some(self.unset)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Trial:
    """A dict of tensors under a prefix, read by the network's names or through a conversion."""

    where: str
    prefix: str
    given: dict[str, Tensor]
    state: dict[str, Tensor]
    missing: list[str]
    layout: str = ""

    @property
    def place(self) -> str:
        return _place(self.where, self.prefix)

    @property
    def rank(self) -> int:
        place = f"{self.where}.{self.prefix}".lower()
        if set(re.split(r"[._]", place)) & set(PREFERRED):
            return 0
        return 2 if any(word in place for word in LAST) else 1


def fit(spec: str, contents: Contents, network: Reference) -> Fit:
    """The weights of a network in a file.

    Args:
        spec: as the user wrote it.
        contents: of the file.
        network: what it needs.

    Raises:
        VitprobeError: the file lacks some of what the network needs, or holds another network.
    """
    found = list(state_dicts(contents.tree))
    if not found:
        raise VitprobeError(f"{contents.file} holds no state dict.")
    needed = sum(_numbers(shape) for shape in network.trunk.values())
    large = [(w, d) for w, d in found if 2 * sum(t.numel() for t in d.values()) >= needed]
    trials = [trial for where, state in large for trial in _native(where, state, network)]
    whole = [trial for trial in trials if not trial.missing]
    if not whole:
        foreign = [trial for where, state in large for trial in _foreign(where, state, network)]
        whole, trials = [trial for trial in foreign if not trial.missing], trials + foreign
    if not whole and not network.strict:
        # timm's own files of this network lack the last norm as well.
        whole = [trial for trial in trials if _norm_alone(trial.missing)]
    if not whole:
        best = min(trials, key=lambda trial: len(trial.missing), default=None)
        raise VitprobeError(_misfit(spec, network, best, large or found))
    whole.sort(key=lambda trial: trial.rank)
    # One place may fit in more than one way; the same tensors are the same network.
    chosen = whole[0]
    others = [trial.place for trial in whole[1:] if _differ(trial, chosen, network)]
    result = _finished(spec, network, chosen, dict(large)[chosen.where])
    return replace(result, others=tuple(dict.fromkeys(others)))


def _differ(one: _Trial, other: _Trial, network: Reference) -> bool:
    """Whether two places hold two networks, or one in two ways."""
    return any(
        not equal(one.state[name], other.state[name])
        for name in network.trunk
        if name in one.state and name in other.state
    )


def _norm_alone(missing: list[str]) -> bool:
    return len(missing) <= 2 and all("norm" in name for name in missing)


def _native(where: str, state: dict[str, Tensor], network: Reference) -> Iterator[_Trial]:
    """Trials by the network's own names, under each prefix that has enough of them."""
    votes: Counter[str] = Counter()
    for key in state:
        rest = key
        while rest:
            if rest in network.trunk:
                votes[key[: len(key) - len(rest)]] += 1
            _, _, rest = rest.partition(".")
    for prefix, count in votes.most_common(TRIED):
        if count < SHARE * len(network.trunk):
            break
        under = _under(prefix, state)
        given = {name: tensor for name, tensor in under.items() if name in network.names}
        yield _trial(where, prefix, given, network, native=True)


def _foreign(where: str, state: dict[str, Tensor], network: Reference) -> Iterator[_Trial]:
    """Trials through a conversion, of everything under each prefix that most names have."""
    counts: Counter[str] = Counter({"": len(state)})
    for key in state:
        parts = key.split(".")
        counts.update(".".join(parts[:i]) + "." for i in range(1, len(parts)))
    for prefix, count in counts.most_common(TRIED):
        if count < SHARE * len(network.trunk) and prefix:
            break
        under = _under(prefix, state)
        renamed = rename(under)
        if renamed is not None:
            yield _trial(where, prefix, renamed, network, written_by(under), native=True)
        elif network.convert is not None:
            yield _trial(where, prefix, under, network, "another layout by timm")


def _trial(
    where: str,
    prefix: str,
    given: dict[str, Tensor],
    network: Reference,
    layout: str = "",
    native: bool = False,
) -> _Trial:
    # Tables are resampled in the type that they have: half precision would be rounded once more.
    given = {k: v.float() if v.dtype in (float16, bfloat16) else v for k, v in given.items()}
    # Some conversions know timm's own files by their classifier, which may have been left out.
    absent = {n: zeros(s) for n, s in network.head.items() if native and n not in given}
    try:
        state = network.converted({**given, **absent})
    except Exception:
        # A conversion that meets another layout than its own raises anything.
        state = given
    state = {name: tensor for name, tensor in state.items() if name not in absent}
    missing = [
        name
        for name, shape in network.trunk.items()
        if name not in state or tuple(state[name].shape) != shape
    ]
    return _Trial(where, prefix, given, state, missing, layout)


def _finished(spec: str, network: Reference, trial: _Trial, whole: dict[str, Tensor]) -> Fit:
    changed = resized_weight(trial.given, trial.state, network)
    if changed:
        raise VitprobeError(f"{spec}: {changed}{_other_patches(spec, changed)}")
    rest = {name: t for name, t in trial.state.items() if name not in network.names}
    outside = [key for key in whole if not key.startswith(trial.prefix)]
    if not trial.layout:
        under = _under(trial.prefix, whole)
        rest = {name: t for name, t in under.items() if name not in network.names}
        rest = _kept_by_timm(network, under, rest)
        outside += [trial.prefix + name for name in under if name not in network.names]
    else:
        outside += [trial.prefix + name for name in rest]
    another = [name for name, tensor in rest.items() if network.changes(name, tensor)]
    if another:
        raise VitprobeError(
            f"{spec}: the file holds another network: it has {_some(another)}, which "
            f"the network lacks."
        )
    classes = network.classes(trial.state)
    state = {n: t for n, t in trial.state.items() if n in network.names}
    if not classes:
        outside += [trial.prefix + name for name in state if name in network.head]
        state = {n: t for n, t in state.items() if n not in network.head}
    return Fit(
        state,
        classes,
        trial.where,
        trial.prefix,
        left_out=tuple(sorted(set(outside))),
        resampled=resampled(trial.given, trial.state, network),
        layout=trial.layout,
        unset=tuple(trial.missing),
    )


def _other_patches(spec: str, changed: str) -> str:
    """The network of the same family with the file's patches, if timm has it."""
    import timm

    name, _, file = spec.partition("@")
    architecture = ALIASES.get(name, name).partition(".")[0]
    side = re.search(r" are (\d+)×\1 pixels", changed)
    if side is None:
        return ""
    wanted = re.sub(r"patch\d+", f"patch{side[1]}", architecture)
    return f" Try {wanted}@{file}." if wanted != architecture and timm.is_model(wanted) else ""


def _kept_by_timm(
    network: Reference, under: dict[str, Tensor], rest: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of tensors that the network lacks, those that timm's conversion has not dropped as void."""
    try:
        kept = network.converted(under)
    except Exception:
        return rest
    return {name: tensor for name, tensor in rest.items() if name in kept}


def _misfit(
    spec: str,
    network: Reference,
    best: _Trial | None,
    found: list[tuple[str, dict[str, Tensor]]],
) -> str:
    """What is missing, and what the file has instead."""
    largest = max(found, key=lambda one: sum(t.numel() for t in one[1].values()))[1]
    library = written_by(largest)
    way = f" It looks like {library}." if library else ""
    if best is None or len(best.missing) == len(network.trunk):
        return (
            f"{spec}: the weights do not fit the architecture. Missing are all of its tensors "
            f"({_some(list(network.trunk))}); the file has {_some(_weights(largest))}.{way}"
        )
    shapes = [
        f"{name} is {_size(tuple(best.state[name].shape))}, not {_size(network.trunk[name])}"
        for name in best.missing
        if name in best.state
    ]
    absent = [name for name in best.missing if name not in best.state]
    faults = [f"Missing: {_some(absent)}"] if absent else []
    faults += [f"Of another shape: {_some(shapes)}"] if shapes else []
    beyond = [name for name in best.given if name not in network.names]
    has = f" The file has {_some(beyond)} instead." if absent and beyond else ""
    return (
        f"{spec}: the weights{_from(best)} do not fit the architecture. {'. '.join(faults)}."
        f"{has}{way}"
    )


def _weights(state: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in state.items() if tensor.is_floating_point()]


def _from(trial: _Trial) -> str:
    return f" of {trial.place}" if trial.where or trial.prefix else ""


def _place(where: str, prefix: str) -> str:
    return " under ".join(filter(None, [where, f"'{prefix}'" if prefix else ""]))


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _groups(names: tuple[str, ...]) -> list[str]:
    """The first parts of names, each once."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _some(names: Any, shown: int = SHOWN) -> str:
    """``a, b, c and 9 more``."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
