"""The layout of convolutions on a CPU: the same values, and everything comes back."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from vitprobe import cka, load_model, localization, skip_ratio, wrap
from vitprobe.running import session as running
from vitprobe.running.layout import channels_last
from vitprobe.running.options import Options
from vitprobe.running.session import session

CPU = torch.device("cpu")


class OwnLayout(nn.Module):
    """Runs only where the channels of its maps are not neighbours."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.given = []

    def forward(self, x):
        self.given.append(x.is_contiguous())
        return self.two(self.one(x).view(len(x), 8 * 32 * 32).view(len(x), 8, 32, 32))


def inside(module, images):
    """What holds in a session: (inputs are channels last, kernels are)."""
    with session(wrap(module), images, Options(device="cpu")) as ready:
        kernels = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
        given = ready.example()[0].is_contiguous(memory_format=torch.channels_last)
        last = [k.is_contiguous(memory_format=torch.channels_last) for k in kernels]
        return given, all(last)


def held(module):
    """Where the parameters of a module lie, and how."""
    return [(p.data_ptr(), p.stride(), p.untyped_storage().nbytes()) for p in module.parameters()]


def test_a_cnn_is_laid_out_and_gets_its_own_tensors_back(tensors):
    module = load_model("test_resnet@random").module
    before = held(module)
    assert inside(module, tensors) == (True, True)
    assert held(module) == before
    with pytest.raises(ZeroDivisionError), session(wrap(module), tensors, Options(device="cpu")):
        raise ZeroDivisionError
    assert held(module) == before


def test_a_network_that_wants_its_own_layout_keeps_it(tensors):
    module = OwnLayout().eval()
    before = held(module)
    assert inside(module, tensors) == (False, False)
    assert module.given[0] is False  # it was tried
    result = cka.measure(wrap(module), tensors, batch_size=10, layers="all", device="cpu")
    assert torch.tensor(result.cka).isfinite().all()
    assert held(module) == before


def test_a_measurement_can_do_without(tensors):
    module = load_model("test_resnet@random").module
    kernel = next(p for p in module.parameters() if p.ndim == 4)
    with session(wrap(module), tensors, Options(device="cpu"), lay_out=False) as ready:
        assert ready.example()[0].is_contiguous() and kernel.is_contiguous()


def test_one_convolution_is_left_alone(tensors):
    assert inside(load_model("test_vit@random", 32).module, tensors) == (False, False)


def test_a_kernel_that_two_models_share_comes_back(tensors):
    one, two = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)).eval() for _ in range(2))
    two[0].weight = one[0].weight
    before = held(one) + held(two)
    with channels_last([one, two, one], CPU, lambda: [tensors[:2]] * 3) as taken:
        assert taken == [True] * 3
        assert one[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert held(one) + held(two) == before


def test_ctrl_c_in_the_trial_brings_everything_back(tensors):
    class Stopped(OwnLayout):
        def forward(self, x):
            raise KeyboardInterrupt

    module = Stopped()
    before = held(module)
    with pytest.raises(KeyboardInterrupt), channels_last([module], CPU, lambda: [tensors[:2]]):
        pass
    assert held(module) == before


def test_other_devices_are_left_alone(tensors):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3))
    before = held(module)
    with channels_last([module], torch.device("cuda"), lambda: 1 / 0) as taken:
        assert taken == [False] and held(module) == before


def arrays(result):
    """The floating-point arrays of a result."""
    found = {name: np.asarray(value) for name, value in vars(result).items() if name != "meta"}
    return {name: value for name, value in found.items() if value.dtype.kind == "f"}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_nfnet"])
@pytest.mark.parametrize("measurement", [cka, skip_ratio, localization])
def test_the_numbers_are_those_of_the_other_layout(measurement, name, tensors, monkeypatch):
    def measured():
        images = tensors[:8].repeat_interleave(2, 2).repeat_interleave(2, 3)
        return measurement.measure(f"{name}@random", images, batch_size=4, device="cpu")

    fast = measured()
    monkeypatch.setattr(running, "channels_last", lambda modules, *_: nullcontext([False]))
    plain = measured()
    assert list(fast.layers) == list(plain.layers)
    for key, value in arrays(plain).items():
        size = np.nanmax(np.abs(value), initial=1e-12)
        np.testing.assert_allclose(arrays(fast)[key], value, rtol=0, atol=1e-4 * size, err_msg=key)
