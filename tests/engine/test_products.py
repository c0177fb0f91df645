"""Linear layers multiply in several ways, to the same result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loops_local.engine.pytorch import lora
from loops_local.engine.pytorch.products import Linear, has_onednn


def _pair(*, bias: bool, may_pack: bool = True, is_head: bool = False) -> tuple[nn.Linear, Linear]:
    plain, ours = nn.Linear(48, 80, bias=bias), nn.Linear(48, 80, bias=bias)
    ours.load_state_dict(plain.state_dict())
    for layer in (plain, ours):
        layer.requires_grad_(False)
    Linear.convert(ours, may_pack=may_pack, is_head=is_head)
    assert isinstance(ours, Linear)
    return plain, ours


@pytest.mark.parametrize("shape", [(1, 48), (70, 48), (3, 1, 48), (2, 50, 48)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("may_pack", [False, True])
def test_results_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool, may_pack: bool) -> None:
    plain, ours = _pair(bias=bias, may_pack=may_pack)
    rows = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(ours(rows), plain(rows))
    torch.testing.assert_close(ours(rows), plain(rows))
    one, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    ours(one).square().sum().backward()
    plain(other).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("is_head", [False, True])
def test_only_sampling_packs_weights(is_head: bool) -> None:
    _, ours = _pair(bias=False, may_pack=not is_head, is_head=is_head)
    ours(torch.randn(70, 48).requires_grad_())
    ours(torch.randn(2, 48))
    assert ours.packed is None
    with torch.inference_mode():
        ours(torch.randn(2, 48))
    assert (ours.packed is not None) == (has_onednn(ours.weight) and not is_head)


def test_large_models_pack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "MAX_PACKED_BYTES", 2 * 48 * 80 * 4 - 1)
    network = nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 48))
    lora.inject(network, skip=nn.Identity())
    with torch.inference_mode():
        network(torch.randn(2, 48))
    assert [layer.packed for layer in network if isinstance(layer, Linear)] == [None, None]
