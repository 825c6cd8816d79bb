"""Our settings in TRL's words."""

from __future__ import annotations

import warnings
from pathlib import Path

from trl.trainer.sft_config import SFTConfig

from gradsift.models.load import resolve_device
from gradsift.train.config import TrainConfig
from gradsift.train.plan import TrainPlan


def resolve_train_device(config: TrainConfig) -> str:
    """Settle the device.

    Args:
        config: settings.

    Returns:
        ``cpu`` or ``cuda:0``.
    """
    return resolve_device(config.device)


def compute_dtype(config: TrainConfig) -> str:
    """Settle the arithmetic.

    Args:
        config: settings.

    Returns:
        ``float32`` or ``bfloat16``.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if resolve_train_device(config) != "cpu" else "float32"


def sft_arguments(config: TrainConfig, plan: TrainPlan, folder: Path, *, save: bool) -> SFTConfig:
    """Translate our settings: one batch per optimizer step, nothing shuffled, logged, or sent anywhere.

    Args:
        config: settings.
        plan: row ids per step.
        folder: output folder.
        save: whether checkpoints are kept.

    Returns:
        TRL's settings.
    """
    on_cpu = resolve_train_device(config) == "cpu"
    saving = save and config.save_steps > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's own default of a renamed setting of transformers
        arguments = _build(config, plan, folder, on_cpu=on_cpu, saving=saving)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device; otherwise transformers would replicate the model
    return arguments


def _build(config: TrainConfig, plan: TrainPlan, folder: Path, *, on_cpu: bool, saving: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        max_steps=plan.num_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=config.lr,
        max_grad_norm=config.max_grad_norm,
        bf16=config.mode == "full" and compute_dtype(config) == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=on_cpu,
        seed=config.seed % 2**32,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_strategy="steps" if saving else "no",
        save_steps=max(1, config.save_steps),
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
