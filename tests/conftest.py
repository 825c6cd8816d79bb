"""Shared set-up: one thread, no network, a toy navigator on disk, shapes checked by jaxtyping and beartype."""

from __future__ import annotations

import os
import socket

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "NO_COLOR": "1",
}.items():
    os.environ.setdefault(_name, _value)

from pathlib import Path  # noqa: E402

from tests import interpreted  # noqa: E402

interpreted.switch_on()  # before anything loads triton

import pytest  # noqa: E402
import tests.shapes  # noqa: E402, F401 - found by name in the hook
from jaxtyping import install_import_hook  # noqa: E402

# Shapes of public tensors are checked in every test; users pay nothing for it.
install_import_hook(
    [f"gradsift.{part}" for part in ("gradients", "geometry", "methods", "types", "seeds")], "tests.shapes.check"
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test that reaches for the network fail at once."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith("127."):  # type: ignore[index]
            raise OSError(f"the tests are offline, and something asked for {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def navigator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama with its tokenizer as an ordinary model folder."""
    from tests.toy import toy_llama, toy_tokenizer

    folder = tmp_path_factory.mktemp("navigator")
    toy_llama(seed=3).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder
