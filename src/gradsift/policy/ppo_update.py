"""One epoch's work of PPO: collect episodes side by side, and take clipped policy steps and critic steps on them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.errors import ConfigError, NumericsError
from gradsift.policy.advantage import gae
from gradsift.policy.descent import Descent, Runner
from gradsift.policy.episodes import Episodes
from gradsift.policy.learned import draw, log_probabilities, tensor
from gradsift.policy.multiplier import MultiplierConfig
from gradsift.policy.network import Shape, actor_logits, critic_values, masked_log_softmax, pool


@dataclass(frozen=True)
class PPOConfig:
    """Settings of the training; defaults of ogs.md section 4, step sizes ours (few large steps, timed on one core).

    Args:
        num_epochs: epochs of the training, >= 1.
        num_episodes: episodes per epoch, >= 2.
        cost_epochs: most epochs of the cost-only policy of the feasibility probe, >= 1.
        num_passes: passes over an epoch's steps, >= 1.
        num_minibatches: actor updates per pass, each on an equal share of the steps, >= 1.
        critic_steps: full-batch critic updates per epoch, >= 1.
        clip: delta of the clipped objective, in (0, 1).
        decay: lambda of GAE, in [0, 1]; the discount is 1.
        target_kl: nats of divergence at which an epoch's actor updates stop.
        entropy: weight of the entropy bonus, >= 0.
        lr: Adam step of the actor in the first epoch.
        last_lr: share of it left in the last epoch, falling by the same factor every epoch, in (0, 1]. Adam's steps do not shrink
            where the gradient does: at a constant step price and policy chase each other around the limit.
        critic_lr: Adam step of the critics.
        largest_gradient: gradients are scaled down to this norm.
        hidden: width of the two hidden layers, >= 1.
        multiplier: rule of the prices.

    Raises:
        ConfigError: a setting out of range.
    """

    num_epochs: int = 60
    num_episodes: int = 32
    cost_epochs: int = 20
    num_passes: int = 1
    num_minibatches: int = 4
    critic_steps: int = 4
    clip: float = 0.2
    decay: float = 0.95
    target_kl: float = 0.02
    entropy: float = 0.003
    lr: float = 5e-3
    last_lr: float = 0.01
    critic_lr: float = 3e-3
    largest_gradient: float = 1.0
    hidden: int = 64
    multiplier: MultiplierConfig = field(default_factory=MultiplierConfig)

    def __post_init__(self) -> None:
        least = {"num_epochs": 1, "num_episodes": 2, "cost_epochs": 1, "num_passes": 1, "num_minibatches": 1,
                 "critic_steps": 1, "hidden": 1, "entropy": 0}  # fmt: skip
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise ConfigError("a setting of the policy's training is too small", where=name,
                                  got=getattr(self, name), expected=f">= {smallest}")  # fmt: skip
        for name in ("target_kl", "lr", "critic_lr", "largest_gradient"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError("a setting of the policy's training is out of range", where=name,
                                  got=getattr(self, name), expected="> 0 and finite")  # fmt: skip
        if not (0 < self.clip < 1 and 0 <= self.decay <= 1 and 0 < self.last_lr <= 1):
            raise ConfigError("clip, decay or last_lr is out of range", got=(self.clip, self.decay, self.last_lr),
                              expected="clip in (0, 1), decay in [0, 1], last_lr in (0, 1]")  # fmt: skip

    def lr_in(self, epoch: int) -> float:
        """The actor's step in an epoch.

        Args:
            epoch: number, from 0.

        Returns:
            Between ``last_lr * lr`` and ``lr``.
        """
        done = min(epoch / max(self.num_epochs - 1, 1), 1.0)
        return self.lr * self.last_lr**done


@dataclass(frozen=True)
class Batch:
    """Steps of running episodes, one row each.

    Args:
        clusters: float32 [B, K, F].
        common: float32 [B, G].
        mask: bool [B, K].
        actions: int64 [B].
        log_old: float32 [B, K] log-probabilities they were drawn with.
        advantage: float64 [B, 1+M] of the reward and of each cost, not standardized.
        returns: float64 [B, 1+M] what the critics are to predict.
        gain: float64 [E] fall of the target loss over each episode, in nats.
        rise: float64 [E, M] rise of each source's loss, in nats.
    """

    clusters: Float[Tensor, "B K F"]
    common: Float[Tensor, "B G"]
    mask: Tensor
    actions: Tensor
    log_old: Float[Tensor, "B K"]
    advantage: Float[np.ndarray, "B A"]
    returns: Float[np.ndarray, "B A"]
    gain: Float[np.ndarray, " E"]
    rise: Float[np.ndarray, "E M"]


def collect(
    episodes: Episodes,
    shape: Shape,
    weights: tuple[Float[np.ndarray, " P"], Float[np.ndarray, " Q"]],
    scale: Float[np.ndarray, " A"],
    numbers: tuple[int, int],
    random: np.random.Generator,
    decay: float,
) -> Batch:
    """Play episodes with the sampling actor and estimate advantages.

    Args:
        episodes: the process.
        shape: sizes of the networks.
        weights: parameters of actor and critics.
        scale: unit of reward and costs for the critics, in nats.
        numbers: first episode and how many, E.
        random: draws one number per episode and step, whether it is over or not.
        decay: lambda of GAE.

    Returns:
        The steps.

    Raises:
        NumericsError: a reward or cost is not finite.
    """
    seen, actor, record = episodes.reset(*numbers), tensor(weights[0]), []
    while not seen.done.all():
        log, clusters, common = log_probabilities(actor, shape, seen)
        share = np.where(seen.mask, np.exp(log.numpy().astype(np.float64)), 0.0)
        chosen = draw(share, random.random(numbers[1]))
        step = episodes.step(chosen)
        outcome = np.column_stack([step.reward, step.cost])
        if not np.isfinite(outcome).all():
            raise NumericsError("a reward or cost is not finite", where=f"episodes from number {numbers[0]}",
                                do="check the simulator's step, or the navigator's learning rate")  # fmt: skip
        record.append((seen.mask, chosen, outcome, log, clusters, common))
        seen = step.observation
    mask, actions, outcomes = (np.stack(part) for part in list(zip(*record, strict=True))[:3])
    logs, clusters, common = (torch.stack(part).flatten(0, 1) for part in list(zip(*record, strict=True))[3:])
    with torch.no_grad():
        values = critic_values(tensor(weights[1]), shape, pool(clusters, common)).numpy().reshape(outcomes.shape)
    running = np.asarray(mask.any(axis=2))
    advantage = gae(outcomes / scale, values, running, decay)
    keep = tensor(running.ravel(), torch.bool)
    return Batch(
        clusters[keep],
        common[keep],
        tensor(mask[running], torch.bool),
        tensor(actions[running], torch.int64),
        logs[keep],
        advantage[running],
        (advantage + values)[running],
        outcomes[:, :, 0].sum(axis=0),
        outcomes[:, :, 1:].sum(axis=0),
    )


def clipped_objective(ratio: Float[Tensor, " B"], advantage: Float[Tensor, " B"], clip: float) -> Float[Tensor, " B"]:
    """min(rho A, clip(rho, 1-delta, 1+delta) A) (Schulman et al. 1707.06347, eq. 7).

    Args:
        ratio: rho, new over old probability of the action.
        advantage: A.
        clip: delta, in (0, 1).

    Returns:
        The objective of each step, to be ascended.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def improve_actor(
    start: Descent,
    shape: Shape,
    batch: Batch,
    advantage: Float[np.ndarray, " B"],
    config: PPOConfig,
    draws: tuple[float, np.random.Generator],
) -> tuple[Descent, float]:
    """Take clipped steps on minibatches until the passes are over or the policy has moved far enough.

    Args:
        start: the actor.
        shape: sizes.
        batch: steps.
        advantage: what to ascend.
        config: settings.
        draws: step size, and what deals the minibatches.

    Returns:
        The actor, and its exact mean KL divergence from the collecting policy on the last minibatch seen, in nats.
    """
    runner, ascend, moved, (lr, order) = Runner(start), tensor(advantage), 0.0, draws
    for _ in range(config.num_passes):
        shuffled = tensor(order.permutation(len(advantage)), torch.int64)
        for part in shuffled.tensor_split(min(config.num_minibatches, len(advantage))):
            new = masked_log_softmax(
                actor_logits(runner.weights, shape, batch.clusters[part], batch.common[part]), batch.mask[part]
            )
            old, chosen = batch.log_old[part], batch.actions[part][:, None]
            moved = float((old.exp() * (old - new.detach())).sum(1).mean())
            if moved > config.target_kl:
                return runner.stop(), moved
            ratio = (new - old).gather(1, chosen).squeeze(1).exp()
            entropy = -(new.exp() * new).sum(1).mean()
            loss = -clipped_objective(ratio, ascend[part], config.clip).mean() - config.entropy * entropy
            runner.descend(loss, lr, config.largest_gradient, "actor")
    return runner.stop(), moved


def improve_critic(start: Descent, shape: Shape, batch: Batch, config: PPOConfig) -> Descent:
    """Fit the critics to the returns by squared error, on the whole batch at once.

    Args:
        start: the critics.
        shape: sizes.
        batch: steps.
        config: settings.

    Returns:
        The critics.
    """
    runner, wanted, pooled = Runner(start), tensor(batch.returns), pool(batch.clusters, batch.common)
    for _ in range(config.critic_steps):
        error = (critic_values(runner.weights, shape, pooled) - wanted).square().mean(0).sum()
        runner.descend(error, config.critic_lr, config.largest_gradient, "critics")
    return runner.stop()
