"""``OnlineTrainer``: the trainer whose batches are chosen while it trains.

Accelerate's loader and loader workers read ahead, so a row would be chosen before the last ones have taught anything: the
loader here is torch's own, in this process, and the sampler is asked for a batch only when its step begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader, Sampler

from gradsift.errors import ConfigError
from gradsift.manifest import hash_parts, pretty_json, write_file
from gradsift.train.config import TrainConfig
from gradsift.train.dataset import TrainData, gather_rows
from gradsift.train.loop import schedule_factor
from gradsift.train.online import OnlineSelection
from gradsift.train.parts import Penalty, StepHook
from gradsift.train.plan import TrainPlan
from gradsift.train.trainer import SelectionTrainer
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE = "online.json"


class OnlineSampler(Sampler[list[int]]):
    """Yields the positions of each step's rows as they are chosen.

    Args:
        online: the decisions.
        ids: ids of the data set, in its order.
    """

    def __init__(self, online: OnlineSelection, ids: Sequence[str]) -> None:
        position = {i: n for n, i in enumerate(ids)}
        self.online = online
        self.position = {n: position[i] for n, i in enumerate(online.ids) if i in position}

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while (batch := self.online.batch(step)) is not None:
            yield [self.position[i] for i in batch]
            step += 1

    def __len__(self) -> int:
        return self.online.pace.max_steps


@dataclass(frozen=True)
class OnlineData:
    """What may be trained on.

    Args:
        rows: id -> token row, every row of a cluster among them.
        weights: id -> weight, finite and > 0; 1 where absent.
    """

    rows: Mapping[str, TokenRow]
    weights: Mapping[str, float]


class OnlineTrainer(SelectionTrainer):
    """Trains on the rows that a policy chooses, until its budget is used.

    The learning rate follows the share of the budget that is spent: with full batches of rows that cost the same, it is
    that of :class:`SelectionTrainer` over as many steps.

    Args:
        model: trained in place; its trainable parameters have ``requires_grad``.
        tokenizer: the model's; only its padding token is used.
        config: settings; ``steps`` and ``epochs`` stay empty, the budget ends training.
        data: rows and weights.
        online: the decisions.
        penalties: added to the loss.
        hook: rewrites the step's gradient before clipping.
        folder: where checkpoints go; None keeps none.
        base: hash of the starting model, so that a checkpoint of another one is refused.
        tick: called with rows and tokens after every step; what it raises stops the run, after a checkpoint.

    Raises:
        ConfigError: the settings and the decisions contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        data: OnlineData,
        online: OnlineSelection,
        *,
        penalties: Sequence[Penalty] = (),
        hook: StepHook | None = None,
        folder: Path | None = None,
        base: str = "",
        tick: Callable[[int, int], None] | None = None,
    ) -> None:
        _check(config, online)
        self.online = online
        # one row per step: each must have something to train on by itself, for it may come to stand alone
        plan = TrainPlan(tuple((online.ids[i],) for i in online.rows))
        super().__init__(
            model, tokenizer, config, TrainData(plan, data.rows, data.weights),
            penalties=penalties, hook=hook, folder=folder, base=base, tick=tick,
        )  # fmt: skip
        self.args.max_steps = online.pace.max_steps
        self.schedule = config.loop(online.pace.nominal_steps)
        self.resume_key = hash_parts([self.resume_key.encode(), online.key().encode()])
        self.callback_handler.callbacks.insert(0, online)  # before whatever writes a checkpoint at the end of a step

    def get_train_dataloader(self) -> DataLoader:
        """Yield the batches as they are chosen; not prepared by accelerate, which would ask for one too many."""
        if self.args.dataloader_num_workers > 0 or self.args.gradient_accumulation_steps != 1:
            raise ConfigError(
                "online selection takes one batch at a time", where="training arguments",
                got=f"{self.args.dataloader_num_workers} loader workers, "
                f"{self.args.gradient_accumulation_steps} batches per step",
                expected="no loader workers, one batch per step",
                do="leave both settings at their defaults; tokens_per_micro_batch cuts a step to fit memory",
            )  # fmt: skip
        return DataLoader(
            self.train_dataset,  # pyright: ignore[reportArgumentType]
            batch_sampler=OnlineSampler(self.online, self._ids),
            collate_fn=gather_rows,
        )

    def _rate_factor(self, step: int) -> float:
        return schedule_factor(self.schedule, self.online.progress(step))

    def _rows_of(self, step: int) -> list[TokenRow]:
        return [self.data.rows[self.online.ids[i]] for i in self.online.batches[step]]

    def _write_more(self, place: Path) -> None:
        write_file(place / STATE, pretty_json(self.online.state()))

    def _read_more(self, place: Path) -> None:
        state: dict[str, Any] = json.loads(
            (place / STATE).read_bytes()
        )  # the checkpoint's record vouches for the bytes
        self.online.restore(state)


def _check(config: TrainConfig, online: OnlineSelection) -> None:
    if config.steps is not None or config.epochs is not None:
        raise ConfigError(
            "the budget of the policy ends training", where="steps, epochs",
            got=f"steps {config.steps}, epochs {config.epochs}", expected="neither", do="leave out both",
        )  # fmt: skip
    width, updates = online.episodes.terms.rows_per_decision, online.config.updates
    if width != updates * config.batch_size:
        raise ConfigError(
            "the rows of a decision are not its batches", where="rows_per_decision",
            got=f"{width} rows", expected=f"{updates} steps of batch_size {config.batch_size}",
            do=f"set rows_per_decision to {updates * config.batch_size}",
        )  # fmt: skip
