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

from torch import Tensor, bfloat16, equal, float16, nn, strided, zeros

from vitprobe.errors import VitprobeError, ran_out, some
from vitprobe.models.contents import Contents, state_dicts
from vitprobe.models.foreign import rename, written_by
from vitprobe.models.names import ALIASES
from vitprobe.models.places import resampled, resized_weight
from vitprobe.models.reference import Reference, is_plain, norm_alone

# Of several networks in a file that fit, averages and teachers are what papers evaluate, and the
# momentum copy of a contrastive method is not.
PREFERRED = ("ema", "teacher", "averaged", "average", "swa")
LAST = ("student", "momentum", "encoder_k")
# Prefixes tried with a layout that timm converts; below this share of the tensors it is none.
TRIED, SHARE = 6, 0.5

# A name that only CLIP's visual tower has.
CLIPS_OWN = "class_embedding"
# A layer in front of the classifier, which timm's networks no longer have.
BEFORE_HEAD = "pre_logits."


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
            parts.append(f"taken from {_place(self.where, self.prefix)}, not {some(self.others)}")
        elif self.prefix:
            parts.append(f"taken from {_place(self.where, self.prefix)}")
        if self.layout:
            parts.append(f"converted from {self.layout}")
        parts += [f"{name} resampled {sizes}" for name, sizes in list(self.resampled.items())[:1]]
        if len(self.resampled) > 1:
            parts[-1] += f" (and {len(self.resampled) - 1} more)"
        if self.left_out:
            parts.append(f"left out: {some(_groups(self.left_out))}")
        if self.unset:
            parts.append(f"not in the file: {some(self.unset)}")
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
    large = [(w, d) for w, d in found if 2 * sum(t.numel() for t in d.values()) >= needed] or found
    trials = [trial for where, state in large for trial in _native(where, state, network)]
    whole = [trial for trial in trials if not trial.missing]
    if not whole:
        foreign = [trial for where, state in large for trial in _foreign(where, state, network)]
        whole, trials = [trial for trial in foreign if not trial.missing], trials + foreign
    if not whole and not network.strict:
        # timm's own files of this network lack the last norm as well.
        whole = [trial for trial in trials if norm_alone(trial.missing)]
    if not whole:
        best = min(trials, key=lambda trial: len(trial.missing), default=None)
        raise VitprobeError(_misfit(spec, network, best, large))
    whole.sort(key=lambda trial: trial.rank)
    # One place may fit in more than one way; the same tensors are the same network.
    chosen = whole[0]
    others = [trial.place for trial in whole[1:] if _differ(trial, chosen, network)]
    result = _finished(spec, network, chosen, dict(large)[chosen.where])
    return replace(result, others=tuple(dict.fromkeys(others)))


def put(spec: str, module: nn.Module, fitted: Fit) -> None:
    """Give a network the weights that have been found for it.

    Raises:
        VitprobeError: something in it would stay as it was made, at random.
    """
    lacking = module.load_state_dict(fitted.state, strict=False).missing_keys
    own = module.state_dict()
    untouched = [
        name
        for name in lacking
        if name not in fitted.unset
        and isinstance(own[name], Tensor)
        and own[name].is_floating_point()
    ]
    if untouched:
        raise VitprobeError(f"{spec}: the file lacks {some(untouched)}.")


def _differ(one: _Trial, other: _Trial, network: Reference) -> bool:
    """Whether two places hold two networks, or one in two ways."""
    return any(
        not equal(one.state[name], other.state[name])
        for name in network.trunk
        if name in one.state and name in other.state
    )


def _has(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape is there, in numbers that can be taken as they are."""
    return name in state and tuple(state[name].shape) == shape and is_plain(state[name])


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
            if CLIPS_OWN in under:
                # The tower alone, as it is called within the whole that timm converts.
                under = {f"visual.{name}": tensor for name, tensor in under.items()}
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
    except Exception as error:
        if ran_out(error):
            raise
        # A conversion that meets another layout than its own raises anything.
        state = given
    state = {name: tensor for name, tensor in state.items() if name not in absent}
    missing = [name for name, shape in network.trunk.items() if not _has(state, name, shape)]
    return _Trial(where, prefix, given, state, missing, layout)


def _finished(spec: str, network: Reference, trial: _Trial, whole: dict[str, Tensor]) -> Fit:
    changed = resized_weight(trial.given, trial.state, network)
    if changed:
        raise VitprobeError(f"{spec}: {changed}{_other_patches(spec, changed)}")
    rest = {name: t for name, t in trial.state.items() if name not in network.names}
    outside = [key for key in whole if not key.startswith(trial.prefix)]
    if not trial.layout:
        under = _under(trial.prefix, whole)
        rest = _kept_by_timm(network, under)
        outside += [trial.prefix + name for name in under if name not in network.names]
    else:
        outside += [trial.prefix + name for name in (*rest, *_dropped(trial))]
    another = [name for name, tensor in rest.items() if network.changes(name, tensor)]
    if another:
        raise VitprobeError(
            f"{spec}: the file holds another network: it has {some(another)}, which "
            f"the network lacks."
        )
    classes = network.classes(trial.state)
    if any(key.startswith(f"{trial.prefix}{BEFORE_HEAD}") for key in whole):
        classes = 0
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


def _dropped(trial: _Trial) -> list[str]:
    """Names of the file's parts (a text tower) of which a conversion has taken nothing."""
    taken = {tensor.data_ptr() for tensor in trial.state.values()}
    parts = {n.partition(".")[0] for n, t in trial.given.items() if t.data_ptr() in taken}
    return [n for n in trial.given if "." in n and n.partition(".")[0] not in parts]


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


def _kept_by_timm(network: Reference, under: dict[str, Tensor]) -> dict[str, Tensor]:
    """What timm's conversion makes of tensors that the network lacks; what it drops is void."""
    absent = {n: zeros(s) for n, s in network.head.items() if n not in under}
    try:
        kept = network.converted({**under, **absent})
    except Exception as error:
        if ran_out(error):
            raise
        kept = under
    return {name: tensor for name, tensor in kept.items() if name not in network.names}


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
    if best is None or not any(name in best.state for name in network.trunk):
        return (
            f"{spec}: the weights do not fit the architecture. Missing are all of its tensors "
            f"({some(list(network.trunk))}); the file has {some(_weights(largest))}.{way}"
        )
    shapes = [
        f"{name} is {_size(tuple(best.state[name].shape))}, not {_size(network.trunk[name])}"
        for name in best.missing
        if name in best.state and tuple(best.state[name].shape) != network.trunk[name]
    ]
    types = [
        f"{name} is {_type(best.state[name])}"
        for name in best.missing
        if name in best.state and tuple(best.state[name].shape) == network.trunk[name]
    ]
    absent = [name for name in best.missing if name not in best.state]
    faults = [f"Missing: {some(absent)}"] if absent else []
    faults += [f"Of another shape: {some(shapes)}"] if shapes else []
    faults += [f"Not in plain numbers (quantised weights?): {some(types)}"] if types else []
    under = _under(best.prefix, dict(found).get(best.where, {}))
    beyond = [name for name in under if name not in network.names]
    has = f" The file has {some(beyond)} instead." if absent and beyond else ""
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


def _type(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return kind if tensor.layout == strided else f"{kind}, {tensor.layout}".replace("torch.", "")


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
