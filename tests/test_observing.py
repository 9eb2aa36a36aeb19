"""Observers of one module share a mode, and see what each would see alone."""

import timm
import torch
from torch.overrides import _get_current_function_mode_stack

from vitprobe.tracing.attention import map_attention, observe
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.observing import Observer, observing
from vitprobe.tracing.trace import AdditionHooks, record


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64).eval(), torch.randn(2, 3, 64, 64)


def test_nested_observers_share_one_mode_and_see_what_each_sees_alone():
    model, images = vit()
    additions = record(model, images).additions
    found = map_attention("vit", model, images)
    sums = map_layers("vit", model, images).choose("paper")
    seen = {}

    def note(who):
        return lambda *tensors: seen.setdefault(who, []).extend(t + t for t in tensors[-2:])

    def attended(i, block, *_):
        seen.setdefault("attention", []).append(block + block)

    # Each adds tensors of its own, which must not count as the model's.
    ways = {
        "skips": lambda: AdditionHooks(model, {a: note("skips") for a in additions[:3]}),
        "more skips": lambda: AdditionHooks(model, {a: note("more skips") for a in additions}),
        "sums": lambda: AdditionHooks(model, after={a: note("sums") for a in additions}),
        "attention": lambda: observe(model, found, attended),
        "capture": lambda: capture(model, sums, lambda i, tensor: note("capture")(tensor)),
    }
    modes = []
    handle = model.blocks[2].register_forward_hook(
        lambda *_: modes.append(len(_get_current_function_mode_stack()))
    )
    with torch.inference_mode():
        expected = model(images)
        for enter in ways.values():
            with enter():
                model(images)
        alone, seen = seen, {}
        modes.clear()
        a, b, c, d, e = (enter() for enter in ways.values())
        with a, b, c, d, e:
            out = model(images)
    handle.remove()
    assert modes == [1]
    assert torch.equal(out, expected)
    assert seen.keys() == alone.keys() == ways.keys()
    for who in ways:
        assert len(seen[who]) == len(alone[who]) > 0
        assert all(torch.equal(one, other) for one, other in zip(seen[who], alone[who])), who
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not _get_current_function_mode_stack()


def test_a_stand_in_is_what_follows_for_all_and_the_last_one_counts():
    model, images = vit()
    additions = record(model, images).additions
    first, totals = additions[0], []
    with torch.inference_mode():
        with AdditionHooks(model, {first: lambda skip, branch: branch}):
            right = model(images)
        for inner in (False, True):
            stand_in = AdditionHooks(model, {first: lambda skip, branch: branch})
            other = AdditionHooks(
                model,
                {first: None if inner else (lambda skip, branch: skip)},
                {first: lambda total: totals.append(total.clone())},
            )
            with other, stand_in:
                assert torch.equal(model(images), right)
        # Entered the other way round, the skip is what goes on.
        with stand_in, AdditionHooks(model, {first: lambda skip, branch: skip}):
            assert not torch.equal(model(images), right)
    assert torch.equal(totals[0], totals[1])


def test_observers_of_different_modules_keep_apart():
    model, images = vit()
    seen = {"outer": 0, "inner": 0}

    class Counts(Observer):
        def __init__(self, who):
            self.who = who

        def after(self, function, args, kwargs, result):
            seen[self.who] += 1

    with (
        torch.no_grad(),
        observing(model, Counts("outer")),
        observing(model.blocks, Counts("inner")),
    ):
        model(images)
        whole, part = seen["outer"], seen["inner"]
        model.blocks(torch.randn(2, 5, 64))
    assert 0 < part < whole == seen["outer"]
    assert seen["inner"] > part
