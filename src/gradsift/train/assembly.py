"""From settings and rows to what training takes: the model, the rows it sees, the plan, penalties and the step hook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradsift.errors import ConfigError, ModelError
from gradsift.seeds import stream
from gradsift.train.config import TrainConfig
from gradsift.train.material import Material, as_model
from gradsift.train.plan import TrainPlan, plan_steps
from gradsift.types import Note, TokenRow

if TYPE_CHECKING:
    from torch import nn

    from gradsift.train.masking import Masked
    from gradsift.train.parts import Cost, Penalty, StepHook
    from gradsift.train.replay import Mixed

END_TURNS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "<turn|>")


@dataclass
class Work:
    """What happens to a run's rows and model on the way to training.

    Args:
        rows: what is trained on.
        masked: token masking, when it is on.
        mixed: replay, when it is on.
        notes: what to beware of.
        cost: of masking.
    """

    rows: tuple[TokenRow, ...]
    masked: Masked | None
    mixed: Mixed | None
    notes: tuple[Note, ...]
    cost: Cost


def load_model(config: TrainConfig, material: Material) -> nn.Module:
    """Load the model that is trained: the base frozen under a fresh adapter, or every weight free.

    Args:
        config: settings.
        material: where the model is.

    Returns:
        The model on its device.

    Raises:
        ModelError: it cannot be loaded.
    """
    from gradsift.models.adapter import adapter_parameters, attach_lora
    from gradsift.models.load import load_navigator
    from gradsift.train.arguments import compute_dtype, resolve_train_device

    # Whole-model training in bfloat16 would lose small updates: its weights are float32 under autocast.
    dtype = compute_dtype(config) if config.mode == "lora" else "float32"
    try:
        loaded = load_navigator(material.resolved, dtype=dtype, device=resolve_train_device(config)).model
    except ModelError as error:
        raise as_model(error) from None
    if config.mode == "full":
        return loaded.requires_grad_(True)
    adapted = attach_lora(loaded, config.lora.recipe(), config.seed)
    for _, p in adapter_parameters(adapted):
        p.requires_grad_(True)
    return adapted


def make_plan(config: TrainConfig, rows: Sequence[TokenRow]) -> TrainPlan:
    """Deal rows into optimizer steps.

    Args:
        config: settings.
        rows: what is trained on, in order.

    Returns:
        The plan.
    """
    return plan_steps(
        [row.id for row in rows],
        batch_size=config.batch_size,
        num_steps=config.steps,
        num_epochs=config.num_epochs,
        stream=stream(config.seed, "train/order"),
        shuffle=config.order == "shuffle",
    )


def prepare_rows(config: TrainConfig, material: Material, model: nn.Module | None) -> Work:
    """Mix in general rows, then mask unlikely tokens of everything that is trained on.

    Args:
        config: settings.
        material: rows.
        model: before training; None leaves masking out (for an estimate).

    Returns:
        The rows and what was done to them.
    """
    from gradsift.train.parts import Cost
    from gradsift.train.replay import mix

    rows, mixed, masked, cost = material.selected, None, None, Cost()
    if config.replay.share:
        draw = stream(config.seed, "train/replay")
        mixed = mix(rows, material.general, share=config.replay.share, unit=config.replay.unit, draw=draw)
        rows = mixed.rows
    notes = material.notes
    if config.stm.on and model is not None:
        from gradsift.train.masking import mask_rows, measure_nats

        nats = measure_nats(model, rows, material.pad_id, config.tokens_per_micro_batch)
        masked = mask_rows(rows, nats, tau=config.stm.tau, drop_share=config.stm.drop_share,
                           min_kept=config.stm.min_kept, keep_ids=end_of_turn(material.tokenizer))  # fmt: skip
        rows, notes, cost = masked.rows, (*notes, *masked.notes), nats.cost
    return Work(rows, masked, mixed, notes, cost)


def end_of_turn(tokenizer: Any) -> set[int]:
    """List the tokens that end a turn: the end token, and those that chat templates use.

    Args:
        tokenizer: the model's.

    Returns:
        Their ids; at least the end token's, where there is one.
    """
    vocabulary = tokenizer.get_vocab()
    known = {vocabulary[name] for name in END_TURNS if name in vocabulary}
    return known | ({int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set())


def make_parts(
    config: TrainConfig, material: Material, model: nn.Module
) -> tuple[tuple[Penalty, ...], StepHook | None]:
    """Build penalties and the step hook on the model before training.

    Args:
        config: settings.
        material: general rows and anchors.
        model: before training.

    Returns:
        Penalties and the hook or None.

    Raises:
        ConfigError: the hook has no reference rows.
    """
    from gradsift.train.penalties import BaseKl, Ewc, L2Sp, estimate_fisher

    penalties: list[Penalty] = []
    if config.kl.weight:
        general = material.general if config.kl.on == "general" else None
        penalties.append(BaseKl(model, config.kl.weight, general=general, rows_per_step=config.kl.rows,
                                pad_id=material.pad_id, seed=config.seed))  # fmt: skip
    if config.l2sp:
        penalties.append(L2Sp(model, config.l2sp))
    if config.ewc.weight:
        draws = stream(config.seed, "train/ewc").uniform([row.id for row in material.general])
        order = sorted(range(len(draws)), key=lambda i: (draws[i], material.general[i].id))
        some = [material.general[i] for i in order[: config.ewc.fisher_rows]]
        penalties.append(Ewc(model, config.ewc.weight, estimate_fisher(model, some, material.pad_id)))
    if config.hook.name is None:
        return tuple(penalties), None
    from gradsift.train.hooks import make_hook

    sources = {name: rows for name, rows in material.anchors.items() if name != "target"}
    if not sources and material.general:
        sources = {"general": material.general}
    if not sources:
        raise ConfigError(
            f"the hook {config.hook.name} has no rows to protect", where="hook",
            expected="a run folder whose recipe has anchors, or general rows",
            do="give the run folder to --selection, or --replay PATH",
        )  # fmt: skip
    hook = make_hook(config.hook.name, config.hook.settings, model=model, sources=sources,
                     pad_id=material.pad_id, seed=config.seed, replay=material.general)  # fmt: skip
    return tuple(penalties), hook
