"""Adam's moments: the optimizer-step identity (T4), its mutants, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.lessons import lesson_rows
from tests.toy import toy_llama

from gradsift.errors import StoreError
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.moments import adam_direction, load_moments, put_moments, read_moments, save_moments
from gradsift.train.parts import trainable

ROWS = lesson_rows()
LR, BETAS, EPS = 1e-3, (0.9, 0.99), 1e-3


def warmed(steps: int) -> Loop:
    """A loop some steps on; a large eps, so that its place matters."""
    loop = Loop(toy_llama(1, torch.float64), LoopConfig(LR, 10, betas=BETAS, eps=EPS, max_grad_norm=0.0), 3)
    for n in range(steps):
        loop.step([ROWS[f"r{n}"]])
    return loop


def wrong_eps(grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int) -> torch.Tensor:
    """The mutant: eps under the root."""
    m, v = BETAS[0] * m + (1 - BETAS[0]) * grad, BETAS[1] * v + (1 - BETAS[1]) * grad**2
    return (m / (1 - BETAS[0] ** (step + 1))) / (v / (1 - BETAS[1] ** (step + 1)) + EPS).sqrt()


def identity_error(steps: int, form: object) -> float:
    """Largest difference between the form and what one real step did, over the largest entry of the step."""
    loop = warmed(steps)
    moments = read_moments(loop.model, loop.optimizer)
    before = {n: p.detach().clone() for n, p in trainable(loop.model)}
    loop.step([ROWS["r9"]])
    worst, size = 0.0, 0.0
    for name, p in trainable(loop.model):
        assert p.grad is not None
        zero = torch.zeros_like(p.grad)
        m, v, t = (moments.exp_avg.get(name, zero), moments.exp_avg_sq.get(name, zero), moments.step.get(name, 0))
        real = (before[name] - p.detach()) / LR
        got = form(p.grad, m, v, t)  # type: ignore[operator]
        worst, size = max(worst, float((got - real).abs().max())), max(size, float(real.abs().max()))
    return worst / size


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_adam_form_equals_one_real_step(steps: int) -> None:
    assert identity_error(steps, lambda g, m, v, t: adam_direction(g, m, v, t, betas=BETAS, eps=EPS)) < 1e-6


@pytest.mark.parametrize("steps", [1, 5])
def test_mutants_are_told_apart(steps: int) -> None:
    assert identity_error(steps, wrong_eps) > 1e-3
    late = lambda g, m, v, t: adam_direction(g, m, v, t + 1, betas=BETAS, eps=EPS)  # noqa: E731
    assert identity_error(steps, late) > 1e-3
    assert identity_error(steps, lambda g, m, v, t: g) > 1e-1


def test_sgd_identity() -> None:
    model = toy_llama(1, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loop = Loop(model, LoopConfig(LR, 1, max_grad_norm=0.0), 3)
    loop.optimizer = optimizer  # type: ignore[assignment]
    before = [p.detach().clone() for p in model.parameters()]
    loop.step([ROWS["r0"]])
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, (old - p.detach()) / LR, rtol=0, atol=1e-6)


def test_moments_survive_the_file_and_go_on_as_before(tmp_path: Path) -> None:
    one = warmed(4)
    save_moments(read_moments(one.model, one.optimizer), tmp_path / "moments.safetensors")
    two = Loop(toy_llama(5, torch.float64), one.config, 3)
    two.model.load_state_dict(one.model.state_dict())
    two.losses = list(one.losses)
    put_moments(two.model, two.optimizer, load_moments(tmp_path / "moments.safetensors"))
    for loop in (one, two):
        loop.step([ROWS["r8"]])
        loop.step([ROWS["r9"]])
    assert one.losses == two.losses
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_without_a_gradient_is_absent() -> None:
    loop = warmed(1)
    assert set(read_moments(loop.model, loop.optimizer).step.values()) == {1}
    fresh = Loop(toy_llama(), LoopConfig(LR, 1), 3)
    assert read_moments(fresh.model, fresh.optimizer).exp_avg == {}


def test_files_that_are_no_moments_and_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "moments.safetensors"
    with pytest.raises(StoreError, match="cannot be read"):
        load_moments(path)
    save_file({"exp_avg/a": torch.zeros(1)}, str(path))
    with pytest.raises(StoreError, match="same parameters"):
        load_moments(path)
    loop = warmed(1)
    moments = read_moments(loop.model, loop.optimizer)
    moments.exp_avg["other"] = torch.zeros(2)  # type: ignore[index]
    with pytest.raises(StoreError, match="do not fit the model"):
        put_moments(loop.model, loop.optimizer, moments)
