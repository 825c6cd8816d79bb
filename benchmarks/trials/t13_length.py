"""T13, length placebo: quality does not depend on length; does the score?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from benchmarks.trials.common import Check, Outcome, Trial, main, over_seeds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradsift.evaluate.statistics import spearman_interval
from gradsift.gradients.loop import example_gradient
from gradsift.methods.base import make_method
from gradsift.seeds import Stream, key64, stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.rescore import RescoreConfig, rescore
from gradsift.types import Budget, Problem, RowStatus, TokenRow

STATES, BOS, PAD = 24, 24, 25
SHORTEST, LONGEST = 4, 128
NUM_POOL, NUM_TARGET, NUM_ANCHOR = 400, 40, 40
NOISE = (0.0, 0.3, 0.6)  # share of a row's tokens drawn at random: its quality
STEPS, BATCH, LR = 150, 16, 3e-3
PERCENT = 25.0
DEFAULT = "cosine, mean loss"


@dataclass(frozen=True)
class Text:
    """One seed of the world: two Markov chains; the model has read the first, the pool and the target are of the second."""

    model: nn.Module
    pool: tuple[TokenRow, ...]
    quality: np.ndarray
    target: tuple[TokenRow, ...]
    anchor: tuple[TokenRow, ...]


def _chain(draw: Stream) -> np.ndarray:
    """Transition probabilities with a few likely successors."""
    return draw.numpy().dirichlet(np.full(STATES, 0.15), size=STATES)


def _row(name: str, chain: np.ndarray, noise: float, draw: Stream, longest: int) -> TokenRow:
    rng = draw.child(name).numpy()
    length = int(np.floor(np.exp(rng.uniform(np.log(SHORTEST), np.log(longest + 1)))))
    ids = np.zeros(length, dtype=np.int32)
    ids[0], state = BOS, int(rng.integers(STATES))
    for t in range(1, length):
        state = int(rng.integers(STATES)) if rng.random() < noise else int(rng.choice(STATES, p=chain[state]))
        ids[t] = state
    return TokenRow(name, ids, np.arange(length) > 0, length, RowStatus.OK)


@lru_cache(maxsize=16)
def text_of(seed: int, num_pool: int = NUM_POOL, steps: int = STEPS, longest: int = LONGEST) -> Text:
    """Build a seed: chains, rows, and a model that has read chain A only."""
    known, new = _chain(stream(seed, "trials/t13/a")), _chain(stream(seed, "trials/t13/b"))
    noises = np.array([NOISE[key64(seed, "trials/t13/noise", k) % len(NOISE)] for k in range(num_pool)])
    rows = stream(seed, "trials/t13/rows")
    pool = tuple(_row(f"p{k:04d}", new, float(noises[k]), rows, longest) for k in range(num_pool))
    config = LlamaConfig(
        vocab_size=STATES + 2,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    torch.manual_seed(key64(seed, "trials/t13/weights") % 2**63)
    model = LlamaForCausalLM(config)
    loop = Loop(model, LoopConfig(lr=LR, total_steps=steps), PAD)
    for s in range(steps):
        loop.step([_row(f"a{s}-{b}", known, 0.0, rows, longest) for b in range(BATCH)])
    return Text(
        model.eval(),
        pool,
        -noises,
        tuple(_row(f"t{k:03d}", new, 0.0, rows, longest) for k in range(NUM_TARGET)),
        tuple(_row(f"k{k:03d}", known, 0.0, rows, longest) for k in range(NUM_ANCHOR)),
    )


def sum_loss_dots(text: Text) -> np.ndarray:
    """Dot [N] of each row's summed-loss gradient with the unit mean of the target's summed-loss gradients, one by one."""
    names = [name for name, _ in text.model.named_parameters()]

    def gradient(row: TokenRow) -> torch.Tensor:
        ids = torch.tensor(row.input_ids.astype(np.int64))
        labels = torch.where(torch.tensor(row.trained), ids, -100)
        got = example_gradient(text.model, names, ids, labels)
        return torch.cat([got.by_name[name].flatten() for name in names]) * row.num_trained

    mean = torch.stack([gradient(row) for row in text.target]).mean(0)
    unit = mean / mean.norm()
    return np.array([float(gradient(row) @ unit) for row in text.pool])


def scores_of(text: Text, problem: Problem) -> dict[str, np.ndarray]:
    """Every score, higher chosen first. The cosine of a row is the same for mean and sum; its target direction is not."""
    num = problem.num_trained
    assert problem.grad_norm is not None
    assert problem.target_cos is not None
    assert problem.target_dot is not None
    dots = sum_loss_dots(text)
    return {
        "cosine, mean loss": problem.target_cos,
        "cosine, sum loss": dots / (problem.grad_norm * num),
        "dot, mean loss": problem.target_dot,
        "dot, sum loss": dots,
        "norm, mean loss": problem.grad_norm,
        "norm, sum loss": problem.grad_norm * num,
        "loss": np.asarray(problem.loss),
    }


def measure(seed: int, text: Text | None = None) -> dict[str, Any]:
    """Rank correlation of each score with length and with quality, and the length of each choice."""
    text = text or text_of(seed)
    config = RescoreConfig(seed=seed)
    problem = rescore(text.model, text.pool, {"A": text.anchor}, text.target, config, pad_id=PAD).problem
    assert problem.size == len(text.pool)
    length, scores = problem.num_tokens.astype(float), scores_of(text, problem)
    chosen = make_method("target_cosine", {}).select(
        problem, Budget(percent=PERCENT), stream(seed, "trials/t13/select")
    )
    return {
        "pool_mean_length": float(length.mean()),
        "default_mean_length": float(np.mean([length[problem.ids.index(i)] for i in chosen.ids])),
        "rho_quality_length": spearman_interval(text.quality, length).rho,
        "scores": tabulate(length, text.quality, scores),
    }


def tabulate(length: np.ndarray, quality: np.ndarray, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Rho with length and quality, and mean length of the highest quarter over the pool's, minus 1."""
    top = {
        name: np.argsort(-score, kind="stable")[: round(len(length) * PERCENT / 100)] for name, score in scores.items()
    }
    return {
        name: {
            "rho_length": spearman_interval(score, length).rho,
            "rho_quality": spearman_interval(score, quality).rho,
            "length_excess": float(length[top[name]].mean() / length.mean() - 1),
        }
        for name, score in scores.items()
    }


def judge(
    figures: Mapping[int, dict[str, Any]], default: Sequence[str] = ("cosine, mean loss", "cosine, sum loss")
) -> Outcome:
    """abs rho <= 0.1 for the default score; the length of its choice within 5% of the pool's."""

    def mean(score: str, key: str) -> float:
        return float(np.mean([f["scores"][score][key] for f in figures.values()]))

    checks = []
    for score in default:
        rho = over_seeds([f["scores"][score]["rho_length"] for f in figures.values()])
        checks.append(Check(f"rho({score}; length)", str(rho), "abs <= 0.1", abs(rho.mean) <= 0.1))
        excess = over_seeds([f["scores"][score]["length_excess"] for f in figures.values()])
        checks.append(
            Check(f"length chosen by {score} over the pool's", str(excess), "abs <= 0.05", abs(excess.mean) <= 0.05)
        )
    names = list(next(iter(figures.values()))["scores"])
    others = ", ".join(f"{n} {mean(n, 'rho_length'):+.2f}" for n in names if n not in default)
    quality = ", ".join(f"{n} {mean(n, 'rho_quality'):+.2f}" for n in names)
    return Outcome("T13", tuple(checks), (f"rho with length of the others: {others}", f"rho with quality: {quality}"))


TRIAL = Trial(
    "T13",
    range(10),
    measure,
    judge,
    {
        "pool": NUM_POOL,
        "target": NUM_TARGET,
        "noise": NOISE,
        "lengths": (SHORTEST, LONGEST),
        "steps": STEPS,
        "percent": PERCENT,
    },
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
