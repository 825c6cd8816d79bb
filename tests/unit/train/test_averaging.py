"""WiSE-FT against the line written out on merged weights."""

from __future__ import annotations

import pytest
import torch
from tests.toy import toy_llama, toy_lora

from gradsift.errors import ConfigError
from gradsift.train.averaging import copy_weights, wise_ft


def moved(seed: int = 7) -> torch.nn.Module:
    model = toy_llama(0, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_full_weights_lie_on_the_line(alpha: float) -> None:
    base, end, model = toy_llama(0, torch.float64), moved(), moved()
    wise_ft(model, alpha, copy_weights(base))
    for got, a, b in zip(model.parameters(), base.parameters(), end.parameters(), strict=True):
        torch.testing.assert_close(got, (1 - alpha) * a + alpha * b)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_adapter_scaled_is_the_line_of_the_merged_weights(alpha: float) -> None:
    base = dict(toy_llama(0, torch.float64).named_parameters())
    end = dict(toy_lora(0, torch.float64).merge_and_unload().named_parameters())
    model = toy_lora(0, torch.float64)
    wise_ft(model, alpha)
    for name, got in model.merge_and_unload().named_parameters():
        torch.testing.assert_close(got, (1 - alpha) * base[name] + alpha * end[name])


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_outside_the_line_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        wise_ft(toy_llama(), alpha, {})


def test_missing_starting_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="starting weights"):
        wise_ft(toy_llama(), 0.5)
