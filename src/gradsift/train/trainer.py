"""``SelectionTrainer``: TRL's SFTTrainer on our own token rows, with row weights, penalties and a gradient hook.

One batch of the data loader is one optimizer step of the plan; ``training_step`` cuts it into micro-batches, so the loss
is the weighted token mean over the whole step, and the hook sees the whole step's gradient before clipping.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_trainer import SFTTrainer

from gradsift.errors import ConfigError, DivergedError, Interrupted
from gradsift.seeds import key64
from gradsift.train import checkpoint
from gradsift.train.arguments import sft_arguments
from gradsift.train.config import TrainConfig
from gradsift.train.dataset import PlanSampler, TrainData, cut_step, gather_rows, make_dataset
from gradsift.train.loop import schedule_factor
from gradsift.train.moments import load_moments, put_moments, read_moments, save_moments
from gradsift.train.parts import (
    Cost,
    Penalty,
    StepHook,
    TrainBatch,
    call_hook,
    forward_nats,
    make_batch,
    trainable,
    trained_weight,
    weighted_loss,
)
from gradsift.train.penalties import begin_step
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SelectionTrainer(SFTTrainer):
    """Trains on a plan; the same losses, step by step, as :class:`gradsift.train.loop.Loop`.

    Args:
        model: trained in place; its trainable parameters have ``requires_grad``.
        tokenizer: the model's; only its padding token is used.
        config: settings.
        data: rows, weights and order.
        penalties: added to the loss.
        hook: rewrites the step's gradient before clipping.
        folder: where checkpoints go; None keeps none.
        base: hash of the starting model and of the rows that penalties and hook read; a checkpoint of others is refused.
        tick: called with rows and tokens after every step; what it raises stops the run, after a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        data: TrainData,
        *,
        penalties: Sequence[Penalty] = (),
        hook: StepHook | None = None,
        folder: Path | None = None,
        base: str = "",
        tick: Callable[[int, int], None] | None = None,
    ) -> None:
        self.settings, self.data, self.penalties, self.hook, self.tick = config, data, tuple(penalties), hook, tick
        self.schedule = config.loop(data.plan.num_steps)
        self.losses: list[float] = []
        self.totals: list[float] = []
        self.cost = Cost()
        self.folder = folder
        rows = make_dataset(data.plan, data.rows, data.weights)
        self.resume_key = data.key(config, base)
        self._ids: list[str] = rows["id"][:]
        bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
        forward = vars(bare).get("forward")
        with tempfile.TemporaryDirectory() as scratch:  # transformers wants a folder, also when nothing is saved
            super().__init__(
                model=model,  # pyright: ignore[reportArgumentType]
                args=sft_arguments(config, data.plan, folder or Path(scratch), save=folder is not None),
                train_dataset=rows,
                processing_class=tokenizer,
                data_collator=gather_rows,  # pyright: ignore[reportArgumentType]
            )
        # TRL's fused head gives no logits, which penalties need; the model's own forward serves.
        if forward is None:
            vars(bare).pop("forward", None)
        else:
            bare.forward = forward
        if self.args.world_size > 1:
            raise ConfigError(
                "training runs in one process", where="gradsift train", got=f"{self.args.world_size} processes",
                do="start it without torchrun; use another trainer on the selected rows for several GPUs",
            )  # fmt: skip
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad) if isinstance(pad, int) else 0
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.remove_callback(PrinterCallback)
        self.add_callback(_Tick(self))

    def get_train_dataloader(self) -> DataLoader:
        """Yield one batch per optimizer step, in the plan's order and no other."""
        loader = DataLoader(
            self.train_dataset,  # pyright: ignore[reportArgumentType]
            batch_sampler=PlanSampler(self.data.plan, self._ids),
            collate_fn=gather_rows,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the plain loop's optimizer: torch's AdamW over the trainable parameters in model order."""
        c = self.schedule
        if self.optimizer is None:
            parameters = [p for _, p in trainable(model or self.model)]  # pyright: ignore[reportArgumentType]
            self.optimizer = torch.optim.AdamW(
                parameters, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the plain loop's schedule."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,  # pyright: ignore[reportArgumentType]
                self._rate_factor,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # What a trainer that chooses its rows while it trains does otherwise.

    def _rate_factor(self, step: int) -> float:
        """Learning-rate factor of a 0-based optimizer step, in [0, 1]."""
        return schedule_factor(self.schedule, step)

    def _rows_of(self, step: int) -> list[TokenRow]:
        """Rows of a 0-based optimizer step that was taken."""
        return [self.data.rows[i] for i in self.data.plan.steps[step]]

    def _write_more(self, place: Path) -> None:
        """Add files to the folder that becomes a checkpoint."""

    def _read_more(self, place: Path) -> None:
        """Take up what ``_write_more`` added to a checkpoint, before training goes on."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Send one optimizer step forward and backward, micro-batch by micro-batch, and call the hook.

        Args:
            model: in training.
            inputs: from ``gather_rows``.
            num_items_in_batch: not used; the weights decide.

        Returns:
            The step's loss with penalties.
        """
        started, at = perf_counter(), self.state.global_step
        model.train()
        torch.manual_seed(key64(self.settings.seed, "loop", at) % 2**63)
        rows, weights = inputs["rows"], inputs["weights"]
        batches = [
            make_batch([rows[i] for i in cut], self.pad_id, self.args.device, [weights[i] for i in cut])
            for cut in cut_step(rows, self.settings.tokens_per_micro_batch)
        ]
        denominator = torch.stack([trained_weight(batch.labels, batch.weights) for batch in batches]).sum()
        begin_step(self.penalties, at)
        loss, total = 0.0, 0.0
        for batch in batches:
            part, whole = self._micro_batch(model, batch, denominator)
            loss, total = loss + part, total + whole
        if self.hook is not None:
            started += call_hook(self.hook, self.model, at)  # pyright: ignore[reportArgumentType]
        self.losses.append(loss)
        self.totals.append(total)
        tokens = sum(row.num_tokens for row in rows)
        used = Cost.of(self.num_parameters, forward=tokens, backward=tokens, seconds=perf_counter() - started)
        self.cost += used
        return torch.tensor(total, device=self.args.device)

    def _micro_batch(self, model: nn.Module, batch: TrainBatch, denominator: Tensor) -> tuple[float, float]:
        """Forward and backward of one micro-batch: its share of the loss, without and with penalties."""
        nats, logits = forward_nats(model, batch, whole=bool(self.penalties))
        loss = weighted_loss(nats, batch.weights, denominator)
        total = loss
        share = float(trained_weight(batch.labels, batch.weights) / denominator)
        for penalty in self.penalties:
            total = total + penalty(model, batch, logits, share)
        if not torch.isfinite(total):
            raise DivergedError(
                "the training loss is not finite",
                where=f"step {self.state.global_step}: rows {', '.join(batch.ids)[:200]}",
                got=f"loss {float(loss.detach())}, with penalties {float(total.detach())}",
                expected="a finite number",
                do="lower the learning rate",
            )
        self.accelerator.backward(total)
        return float(loss.detach()), float(total.detach())

    def resume(self) -> checkpoint.Found:
        """Train, from the newest whole checkpoint when there is one.

        Returns:
            What was resumed from, and remarks.
        """
        none = checkpoint.Found(None, {}, ())
        found = checkpoint.find_checkpoint(self.folder, self.resume_key) if self.folder else none
        if found.path is None:
            self.train()
            return found
        record = found.record
        self.losses, self.totals = list(record["losses"]), list(record["totals"])
        self.cost = Cost(**record["cost"])
        for part, cost in zip(self._parts(), record["part_costs"], strict=True):
            part.cost = Cost(**cost)
        restore = getattr(self.hook, "restore", None)
        if restore is not None:
            kept = found.path / checkpoint.HOOK
            tensors = checkpoint.load_tensors(kept) if kept.is_file() else {}
            tensors = {name: tensor.to(self.args.device) for name, tensor in tensors.items()}
            restore(checkpoint.join_state(record["hook"], tensors))
        self._read_more(found.path)
        self.train(resume_from_checkpoint=str(found.path))
        return found

    def _parts(self) -> list[Any]:
        return [*self.penalties, *([self.hook] if self.hook is not None else [])]

    # What transformers would pickle is written as safetensors and JSON instead, and whole or not at all.

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        state = getattr(self.hook, "state", None)  # a hook with a memory gives it as plain values and tensors
        record = {"key": self.resume_key, "losses": self.losses, "totals": self.totals, "cost": vars(self.cost),
                  "part_costs": [vars(part.cost) for part in self._parts()],
                  "hook": checkpoint.split_state(state(), tensors) if state is not None else None}  # fmt: skip

        def write(place: Path) -> None:
            weights = {n: p.detach().cpu().contiguous() for n, p in trainable(self.model)}  # pyright: ignore[reportArgumentType]
            save_file(weights, str(place / checkpoint.WEIGHTS))
            save_moments(read_moments(self.model, self.optimizer), place / checkpoint.MOMENTS)  # pyright: ignore[reportArgumentType]
            self.state.save_to_json(str(place / checkpoint.STATE))
            if tensors:
                save_file(tensors, str(place / checkpoint.HOOK))
            self._write_more(place)

        assert self.folder is not None
        checkpoint.save_checkpoint(self.folder, self.state.global_step, record, write)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = checkpoint.load_tensors(Path(resume_from_checkpoint) / checkpoint.WEIGHTS)
        named = dict(trainable(self.model))  # pyright: ignore[reportArgumentType]
        if saved.keys() != named.keys():
            odd = sorted(saved.keys() ^ named.keys())
            raise ConfigError("the checkpoint does not fit the model", where=resume_from_checkpoint, got=odd[0])
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        put_moments(self.model, self.optimizer, load_moments(Path(checkpoint) / "moments.safetensors"))  # pyright: ignore[reportArgumentType]
        scheduler: Any = self.lr_scheduler
        scheduler.last_epoch = self.state.global_step
        for group in self.optimizer.param_groups:  # pyright: ignore[reportOptionalMemberAccess]
            group["lr"] = self.schedule.lr * self._rate_factor(self.state.global_step)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: there is no loss scaling."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step seeds torch by its number."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Give 0: ``cost`` counts, with the hooks' and penalties' share."""
        return 0

    def _send_telemetry(self) -> None:
        """Nothing: gradsift asks the network for nothing."""


class _Tick(TrainerCallback):
    """Tells the caller of every step; when it raises, the state is saved first."""

    def __init__(self, trainer: SelectionTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer.tick is None:
            return
        rows = trainer._rows_of(state.global_step - 1)
        try:
            trainer.tick(len(rows), sum(row.num_tokens for row in rows))
        except Interrupted:
            if trainer.folder is not None and trainer.settings.save_steps:
                trainer._save_checkpoint(trainer.model)
            raise
