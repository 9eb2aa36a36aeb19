"""What receptive fields look at in a model: layers with a centre and a gradient, and channels.

Chosen on the session's example, with its graph: a layer from which no gradient leads to the image
is left out, and a line says why, rather than drawn as a field of zeros.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprobe.errors import NotApplicable, ran_out
from vitprobe.running import memory, processes
from vitprobe.running.grids import lost_of, tell_lost
from vitprobe.running.loading import decoder_ended
from vitprobe.running.session import Session
from vitprobe.statistics.fields import channels_of_images
from vitprobe.tracing.centre_gradients import Centre, Site, centres, sites_of
from vitprobe.tracing.layers import Choice, words
from vitprobe.tracing.theoretical_field import theoretical_fields

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """What is looked at in a model.

    Attributes:
        sites: in their order.
        drawn: of each site the channels that are looked at in each image, (images, k); None where
            they are not drawn.
        boxes: of each site, the theoretical field.
        side: of the model's input.
        attends: whether the model does.
        at_once: images whose graph is in memory at one time.
        cut: labels of layers that are left out, since no gradient leads from them to the image.
    """

    sites: list[Site]
    drawn: list[Tensor | None]
    boxes: list[Box | None]
    side: tuple[int, int]
    attends: bool
    at_once: int
    cut: list[str]


def plan_of(
    ready: Session,
    m: int,
    layers: Choice,
    channels: int | str,
    signed: bool,
    pre_residual: bool,
    groups: int,
) -> Plan:
    """Choose what is looked at in a model; parameters are not to ask for gradients.

    Args:
        ready: the session.
        m: number of the model.
        layers: see ``receptive_field.measure``, as ``channels``, ``signed``, ``pre_residual``.
        groups: into which images are dealt out by their position.

    Raises:
        NotApplicable: no layer has a centre, or no gradient leads to the image.
        VitprobeError: unknown layers.
    """
    model, example = ready.models[m], ready.example()[m]
    found = ready.layers(m)
    chosen = found.choose(layers)
    if pre_residual:
        owners = {layer.module for layer in chosen}
        chosen = [la for la in found.layers if la.addition and la.module in owners]
    grids = ready.places(m, chosen)
    sites = sites_of(chosen, grids, pre_residual)
    lost = lost_of(list(zip(chosen, grids)))
    if not sites or any(layer.label in words(layers) for layer, _ in lost):
        why = (
            f"layer {lost[0][0].label} of {model.name}: {lost[0][1]}"
            if lost
            else (f"none of these layers of {model.name} has a centre")
        )
        raise NotApplicable(f"--layers: {why}.", model.name)
    tell_lost(model.name, lost)
    # A branch and the sum that it goes into belong together.
    together = 2 if pre_residual else 1
    found_centres, size = _tried(ready, m, sites)
    cut = {site.label: one.cut for site, one in zip(sites, found_centres) if one.cut}
    groups_of_sites = [sites[i : i + together] for i in range(0, len(sites), together)]
    sites = [site for some in groups_of_sites for site in some
             if not any(other.label in cut for other in some)]  # fmt: skip
    _tell_cut(model.name, cut, refused=not sites or any(label in words(layers) for label in cut))
    whole = [site for site in sites if not site.branch]
    with ready.autocast():
        boxes = theoretical_fields(
            model.module,
            [site.layer for site in whole],
            [site.centre for site in whole],
            example[:1],
            [site.places for site in whole],
        )
    # A branch stands before its sum, and sees no farther.
    boxes = [box for box in boxes for _ in range(together)]
    drawn: list[Tensor | None] = []
    for site in sites:
        if signed or channels == "all" or int(channels) >= site.channels:
            drawn.append(None)
            continue
        # Layers of one width are compared on the same channels, as are a branch and its sum.
        generator = torch.Generator().manual_seed(ready.options.seed)
        count = len(ready.images), int(channels)
        drawn.append(channels_of_images(site.channels, *count, groups, generator))
    side = (example.shape[-2], example.shape[-1])
    at_once = _at_once(ready, size)
    return Plan(sites, drawn, boxes, side, found.has_attention, at_once, list(cut))


def _tried(ready: Session, m: int, sites: list[Site]) -> tuple[list[Centre], int]:
    """The centres in a pass of the example, and bytes of an image's graph.

    Raises:
        NotApplicable: the pass, or a gradient through all of it, cannot be made.
    """
    model, inputs = ready.models[m], ready.example()[m].clone().requires_grad_()
    known = [*model.module.parameters(), *model.module.buffers(), inputs]
    found: list[Centre] = []
    try:
        size = memory.fullest(
            lambda: found.extend(centres(model.module, sites, inputs, ready.autocast)), known
        )
        attached = [centre.value for centre in found if not centre.cut]
        if attached:
            torch.autograd.grad(attached[-1].sum(), inputs)
    except RuntimeError as error:
        raise failed(model.name, error) from error
    return found, size // len(inputs)


def _at_once(ready: Session, size: int) -> int:
    """How many images' graphs fit into half of what is free."""
    free, most = memory.free_bytes(ready.device), ready.options.batch_size
    if free is None:
        return most
    here = processes.on_this_machine() if ready.device.type == "cpu" else 1
    return max(1, min(most, free // 2 // here // max(1, size)))


def _tell_cut(name: str, cut: dict[str, str], refused: bool) -> None:
    """Say of the first layer without a gradient why, or raise it."""
    for label, why in list(cut.items())[:1]:
        if refused:
            raise no_gradient(name, label, why)
        text = f"vitprobe: {no_gradient(name, label, why)}"
        others = len(cut) - 1
        text += f" It is left out, with {others} more such layers." if others else ""
        print(text + ("" if others else " It is left out."), file=sys.stderr)


def no_gradient(name: str, label: str, why: str) -> NotApplicable:
    """Why a layer has no receptive field."""
    return NotApplicable(
        f"No gradient leads from the layer {label} of {name} to the image: {why}.", name
    )


def failed(name: str, error: RuntimeError) -> Exception:
    """What is told of an error of autograd, or of a forward pass that fails only under it."""
    if ran_out(error) or decoder_ended(error):
        return error
    text = str(error).strip().partition("\n")[0]
    return NotApplicable(f"{name} cannot be differentiated: {type(error).__name__}: {text}", name)
