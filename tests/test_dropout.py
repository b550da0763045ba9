"""train/fitting/dropout.py. Oracle: what nn.Dropout promises."""

import pytest
import torch
from torch import nn

from train.fitting.dropout import CpuDropout, replace_dropout


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 999), (7,)])  # numbers of elements that 4 does not divide
def test_elements_are_0_or_scaled_so_that_the_mean_stays(p, shape):
    torch.manual_seed(0)
    x = torch.ones(shape)
    y = CpuDropout(p)(x)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)  # p is rounded to 1 / 65,536
    if len(shape) == 2:
        assert (y == 0).double().mean().item() == pytest.approx(p, abs=2e-3)  # 4 standard deviations: 1.6e-3
        share = (y == 0).double()
        neighbours = ((share[:, 1:] - p) * (share[:, :-1] - p)).mean() / (p * (1 - p))
        assert abs(neighbours) < 5e-3  # those that come from one number are independent


def test_the_gradient_passes_where_the_element_was_kept():
    x = torch.randn(50, 50, requires_grad=True)
    y = CpuDropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.equal(x.grad * x, y)


def test_equal_seeds_give_equal_masks_and_evaluation_changes_nothing():
    x, layer = torch.randn(20, 30).bfloat16(), CpuDropout(0.5)
    masked = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masked.append(layer(x))
    assert torch.equal(masked[0], masked[1])
    assert not torch.equal(masked[0], masked[2])
    assert masked[0].dtype == torch.bfloat16
    assert layer.eval()(x) is x
    assert CpuDropout(0.0)(x) is x


def test_it_takes_the_place_of_dropout_alone():
    layers = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.25), nn.GELU())
    replace_dropout(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, CpuDropout, nn.GELU]
    assert layers[1].dropped == 2**14
