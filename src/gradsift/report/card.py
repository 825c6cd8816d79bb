"""The selection card: ``selection/README.md``, a data set card for a folder that others can load or train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from gradsift.report.mixture import mixture_section

LIMITS = """- Signals are first-order and were measured at the navigator's starting weights; training moves on.
- Directions and cosines are the navigator's; whether a larger model shares them has to be checked on that model.
- A selection is a proposal, not a result: compare it with a random draw of the same number of trained tokens.
- Gradients can be inverted to text: treat the folder `signals/` like the raw rows."""


def render_card(manifest: Mapping[str, Any]) -> str:
    """Write the card of a finished selection.

    Args:
        manifest: content of ``manifest.json``.

    Returns:
        Markdown with YAML front matter for a hub-ready folder.
    """
    chosen, rows = manifest["selection"], manifest["rows"]
    front = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "selected.jsonl"}]}],
        "tags": ["gradsift", "data-selection", chosen["method"]],
        "size_categories": [_size(chosen["num_rows"])],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        "# Selected fine-tuning rows",
        f"{chosen['num_rows']} of {rows['usable']} usable rows ({chosen['num_trained']} of {rows['trained_tokens']} "
        f"trained tokens), chosen by gradsift with `{chosen['method']}` under the budget `{chosen['budget']}`, "
        f"seed {chosen['seed']}. The reason for every row, chosen or not, is in `audit.parquet`.",
        "## How it was made",
        f"```\n{manifest['command']}\n```",
        _inputs(manifest),
        _navigator(manifest),
        _directions(manifest),
        _notes(chosen),
        mixture_section(manifest),
        "## Use",
        _use(manifest),
        "## Limits",
        LIMITS,
        "## License",
        "The license of each source pool applies to its rows.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _size(count: int) -> str:
    for bound, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if count < bound:
            return name
    return "n>1M"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _inputs(manifest: Mapping[str, Any]) -> str:
    lines = ["| role | label | path | rows | sha256 |", "|---|---|---|---|---|"]
    for entry in manifest["inputs"]:
        cells = (entry["role"], entry["label"], entry["path"], entry["num_rows"], entry["sha256"][:16])
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _navigator(manifest: Mapping[str, Any]) -> str:
    navigator = manifest.get("navigator")
    if not navigator:
        return "No model was needed: the method looks at texts and lengths alone."
    return (
        f"Navigator: {_cell(navigator['source'])}, gradients over {navigator['parameters']} "
        f"({navigator['num_parameters']} weights, {navigator['coverage']:.1%} seen), {navigator['dtype']}; "
        f"weights sha256 {navigator['model_sha256'][:16]}."
    )


def _directions(manifest: Mapping[str, Any]) -> str:
    directions = manifest.get("directions")
    if not directions:
        return ""
    lines = ["| direction | role | rows | split-half reliability |", "|---|---|---|---|"]
    for d in directions:
        role = d["role"] if d["reliable"] else "no reliable direction"
        lines.append(
            f"| {_cell(d['name'])} | {role} | {d['num_rows']} | {d['reliability']:.2f} (sd {d['reliability_sd']:.2f}) |"
        )
    return "\n".join(lines)


def _notes(chosen: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_cell(note['text'])}" for note in chosen["notes"])


def _use(manifest: Mapping[str, Any]) -> str:
    loss_on = (manifest.get("data") or {}).get("loss_on")
    shapes = {shape for e in manifest["inputs"] if e["role"] == "pool" for shape in e.get("shapes", {})}
    default = "assistant" if shapes & {"messages", "sharegpt", "alpaca"} else "completion"
    rule = loss_on or ("all" if shapes == {"text"} else default)
    return f"""```python
from datasets import load_dataset

rows = load_dataset("json", data_files="selected.jsonl", split="train")
```

The loss was taken on: {rule}. Train with the same mask:

```python
# TRL{_template(manifest)}
SFTConfig(assistant_only_loss={rule == "assistant"}, completion_only_loss={rule == "completion"},
          max_length={(manifest.get("data") or {}).get("max_length", 1024)})
```

```json
{{"gradsift_selected": {{"file_name": "selected.jsonl"{_llama_factory(shapes)}}}}}
```

(an entry of LLaMA-Factory's `dataset_info.json`)

```yaml
# axolotl
datasets:
  - path: json
    data_files: selected.jsonl{_axolotl(shapes)}
```"""


def _template(manifest: Mapping[str, Any]) -> str:
    if (manifest.get("data") or {}).get("template_origin") != "gradsift":
        return ""
    return (
        "; the model's template does not say what the assistant wrote, so use the marked one that renders the same text:\n"
        "# tokenizer.chat_template = open('chat_template.jinja').read()"
    )


def _llama_factory(shapes: set[str]) -> str:
    if shapes & {"messages", "sharegpt"}:
        return ', "formatting": "sharegpt"'
    return ""


def _axolotl(shapes: set[str]) -> str:
    if "messages" in shapes:
        return "\n    type: chat_template\n    field_messages: messages"
    return "\n    type: alpaca" if "alpaca" in shapes else "\n    type: completion"
