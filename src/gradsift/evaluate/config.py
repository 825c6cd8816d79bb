"""Settings of ``gradsift evaluate``: models, sets and how they are measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gradsift.recipe import DataConfig, SourceConfig, Strict


class RoleSource(SourceConfig):
    """A named file with its role.

    Args:
        label: name of the set.
        path: local file or hub id.
        role: domain (what must be learned) or general (what must be kept).
    """

    role: Literal["domain", "general"] = "general"


class BenchTask(Strict):
    """A task of lm-eval with its role.

    Args:
        name: of the task.
        role: domain or general.
    """

    name: str = Field(min_length=1)
    role: Literal["domain", "general"] = "general"


class LmEvalConfig(Strict):
    """Benchmarks of lm-eval from a local folder.

    Args:
        tasks: which of them.
        folder: YAML task files.
        batch_size: rows at once.
        limit: first so many questions of each task; None for all.
        num_fewshot: examples before each question; None for what the task says.
    """

    tasks: tuple[BenchTask, ...] = ()
    folder: str | None = None
    batch_size: int = Field(default=8, ge=1)
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)


class EvaluateConfig(Strict):
    """Everything that determines a run of ``gradsift evaluate``.

    Args:
        model: the base model: auto, hub id, local folder or GGUF file.
        revision: 40-hex commit of a hub id.
        tuned: folder of the adapter or of the whole model after fine-tuning; None measures the base model alone.
        domain: rows of what must be learned, one source per set.
        general: rows of what must be kept, one source per set.
        choice: multiple-choice questions.
        choice_style: how questions are put: plain, chat, or auto (chat when the tokenizer has a chat template).
        split_by: column of the rows that names their source, such as subject; None keeps each set whole.
        lm_eval: benchmarks.
        data: reading and masking; the trainer uses the same values.
        divergence: measure KL(base || tuned) on the domain and general rows.
        tokens_per_batch: longest row times rows of a micro-batch never exceed this.
        dtype: arithmetic of the models.
        device: auto, cpu, cuda or cuda:N.
        seed: seed of the fine-tuning run that is measured; it stands beside every figure.
    """

    model: str = "auto"
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    tuned: str | None = None
    domain: tuple[SourceConfig, ...] = ()
    general: tuple[SourceConfig, ...] = ()
    choice: tuple[RoleSource, ...] = ()
    choice_style: Literal["auto", "plain", "chat"] = "auto"
    split_by: str | None = None
    lm_eval: LmEvalConfig = LmEvalConfig()
    data: DataConfig = DataConfig()
    divergence: bool = True
    tokens_per_batch: int = Field(default=2048, ge=1)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    seed: int = Field(default=42, ge=0, lt=2**63)
