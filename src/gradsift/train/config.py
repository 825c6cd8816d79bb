"""Settings of a fine-tuning run: strict, frozen, and refused when two of them contradict each other (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gradsift.recipe import DataConfig, LoraConfig, SourcePath, Strict
from gradsift.train.loop import LoopConfig


class TrainLora(Strict):
    """The adapter that is trained in mode ``lora``.

    Args:
        rank: LoRA rank.
        alpha: LoRA alpha; the scale is alpha / rank.
        target_modules: module names, or all-linear.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: str | tuple[str, ...] = "all-linear"

    def recipe(self) -> LoraConfig:
        """Translate to the navigator's own section, so that both adapters start from the same bits.

        Returns:
            The recipe's section.
        """
        return LoraConfig(rank=self.rank, alpha=self.alpha, target_modules=self.target_modules)


class KlConfig(Strict):
    """Kullback-Leibler divergence to the base model, added to the loss.

    Args:
        weight: factor of the mean KL in nats per token; 0 switches it off.
        on: ``batch`` on the trained tokens of the step's rows, ``general`` on rows of ``general``.
        rows: general rows per step.
    """

    weight: float = Field(default=0.0, ge=0.0)
    on: Literal["batch", "general"] = "batch"
    rows: int = Field(default=4, ge=1)


class EwcConfig(Strict):
    """Elastic weight consolidation.

    Args:
        weight: lambda of the paper; 0 switches it off.
        fisher_rows: general rows the diagonal Fisher information is estimated on.
    """

    weight: float = Field(default=0.0, ge=0.0)
    fisher_rows: int = Field(default=200, ge=1)


class StmConfig(Strict):
    """Selective token masking: unlikely tokens carry no loss.

    Args:
        tau: keep tokens of perplexity at most this; or
        drop_share: share of the trained tokens to drop. None of the two switches masking off.
        min_kept: rows with fewer kept tokens are not trained on, and counted.
    """

    tau: float | None = Field(default=None, gt=1.0)
    drop_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    min_kept: int = Field(default=1, ge=1)

    @property
    def on(self) -> bool:
        """Whether tokens are masked."""
        return self.tau is not None or self.drop_share is not None

    @model_validator(mode="after")
    def _one(self) -> StmConfig:
        if self.tau is not None and self.drop_share is not None:
            raise ValueError("give tau or drop_share, not both")
        return self


class HookConfig(Strict):
    """What rewrites the gradient before clipping.

    Args:
        name: ``agem``, ``pcgrad`` and so on; None for nothing.
        settings: the hook's own fields.
    """

    name: str | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict)


class ReplayConfig(Strict):
    """General rows that take the place of selected ones, so that the budget stays what it was.

    Args:
        share: share of the budget, in [0, 1).
        unit: what is shared out: ``rows`` or trained ``tokens``.
    """

    share: float = Field(default=0.0, ge=0.0, lt=1.0)
    unit: Literal["rows", "tokens"] = "rows"


PolicyName = Literal[
    "uniform", "size_proportional", "ogs_dual_clusters", "ogs_dual_priced", "epsilon_greedy", "exp3", "thompson",
    "ppo_lagrangian",
]  # fmt: skip


class OnlineSection(Strict):
    """Rows that are chosen while the model trains, from the whole pool of a finished run of ``gradsift select``.

    Args:
        policy: who decides which cluster of rows feeds the next steps; None trains on the selected rows, a fixed list.
        updates: optimizer steps per decision; the held-out losses are measured after each decision.
        rescore_every: optimizer steps after which the clusters' statistics are measured anew; 0 for never.
        rescore_with: the ``model`` in training measures them, or the run's ``navigator`` (on the rows that are left).
        shuffle: draw the order of rows within each cluster by the seed; else that of the run's own draw.
        allowed_rise: allowed rise of each protected source's held-out loss, as a share of its loss at the start; None
            takes the run's, or 0.01.
        allowed_nats: the same in nats, instead of the share; None takes the run's.
    """

    policy: PolicyName | None = None
    updates: int = Field(default=1, ge=1)
    rescore_every: int = Field(default=0, ge=0)
    rescore_with: Literal["model", "navigator"] = "model"
    shuffle: bool = False
    allowed_rise: float | None = Field(default=None, gt=0)
    allowed_nats: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> OnlineSection:
        if self.policy is None and (odd := sorted(self.model_fields_set - {"policy"})):
            raise ValueError(f"online.{odd[0]} needs a policy: online.policy=NAME")
        if self.rescore_with == "navigator" and not self.rescore_every:
            raise ValueError("rescore_with needs an interval: online.rescore_every=20")
        if self.allowed_rise is not None and self.allowed_nats is not None:
            raise ValueError("give online.allowed_rise or online.allowed_nats, not both")
        return self


class TrainConfig(Strict):
    """Everything that determines a fine-tuning run, apart from the rows.

    Args:
        model: hub id, local folder or GGUF file of the model that is trained; auto is the packaged SmolLM2-135M-Instruct.
        revision: 40-hex commit of a hub id.
        mode: ``lora`` trains an adapter, ``full`` every weight.
        lora: the adapter.
        lr: peak learning rate of AdamW.
        schedule: learning rate over the run.
        warmup_steps: linear warm-up.
        epochs: passes over the rows; or
        steps: optimizer steps. Exactly one of the two.
        batch_size: rows per optimizer step.
        tokens_per_micro_batch: longest row times rows of one forward pass; a step is cut into as many as it takes.
        weight_decay: decoupled, on every trained weight.
        max_grad_norm: clipping of the step's gradient; 0 for none.
        gradient_checkpointing: less memory for a second forward.
        dtype: ``bfloat16``: the frozen base in bfloat16 under a float32 adapter (lora), float32 weights under autocast
            (full); auto is bfloat16 on CUDA and float32 elsewhere.
        device: auto, cpu or cuda (the first visible one).
        order: ``shuffle`` every epoch, or the selection's own order.
        data: reading and masking of rows; None takes the selecting run's, or the defaults for a bare file.
        general: files of general rows, for replay, KL and EWC, and for the hook when the run has no anchors.
        held_out: files of evaluation rows; nothing in them may be trained on.
        replay: general rows mixed in.
        kl: penalty.
        l2sp: factor of half the squared distance to the starting weights (Li et al., arXiv 1802.01483, eq. 2).
        ewc: penalty.
        wise_ft: alpha of theta0 + alpha (theta - theta0), applied after training (arXiv 2109.01903); 1 changes nothing.
        stm: token masking.
        hook: gradient surgery.
        online: a policy that chooses the rows during training.
        seed: seed of the data order, the adapter's start, dropout and every draw.
        save_steps: steps between checkpoints; 0 for none.
        save_moments: keep Adam's moments beside the result.
    """

    model: str = "auto"
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    mode: Literal["lora", "full"] = "lora"
    lora: TrainLora = TrainLora()
    lr: float = Field(default=2e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    tokens_per_micro_batch: int = Field(default=4096, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    order: Literal["shuffle", "selection"] = "shuffle"
    data: DataConfig | None = None
    general: tuple[SourcePath, ...] = ()
    held_out: tuple[SourcePath, ...] = ()
    replay: ReplayConfig = ReplayConfig()
    kl: KlConfig = KlConfig()
    l2sp: float = Field(default=0.0, ge=0)
    ewc: EwcConfig = EwcConfig()
    wise_ft: float = Field(default=1.0, ge=0.0, le=1.0)
    stm: StmConfig = StmConfig()
    hook: HookConfig = HookConfig()
    online: OnlineSection = OnlineSection()
    seed: int = Field(default=42, ge=0, lt=2**63)
    save_steps: int = Field(default=100, ge=0)
    save_moments: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        asks = [name for name, on in (("replay", self.replay.share > 0), ("ewc", self.ewc.weight > 0),
                                      ("kl.on=general", self.kl.weight > 0 and self.kl.on == "general")) if on]  # fmt: skip
        if asks and not self.general:
            raise ValueError(f"{', '.join(asks)} needs general rows: name their files in general (--replay PATH)")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_sections(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the online section out where it decides nothing, so that keys of runs on fixed lists stay what they were."""
        out = handler(self)
        if self.online.policy is None:
            out.pop("online", None)
        return out

    @property
    def num_epochs(self) -> float | None:
        """Passes over the rows: as given, or 1 when neither epochs nor steps are."""
        return 1.0 if self.epochs is None and self.steps is None else self.epochs

    def loop(self, total_steps: int) -> LoopConfig:
        """Give the optimizer and schedule that the trainer and its plain twin share.

        Args:
            total_steps: optimizer steps of the plan.

        Returns:
            The loop's settings.
        """
        return LoopConfig(
            lr=self.lr,
            total_steps=total_steps,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
        )
