"""Triton kernels on a CPU: switch the interpreter on before triton is imported, and let it live with numpy 2.5."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

HERE = importlib.util.find_spec("triton") is not None


def switch_on() -> None:
    """Ask for the interpreter where triton is installed and no GPU is; before anything imports triton."""
    if HERE and not (any(Path("/dev").glob("nvidia*")) or shutil.which("nvidia-smi")):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def prepare() -> None:
    """Repair what is needed of the interpreter."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch(tensor, scope=None):
        # A scalar is an array of shape [1] there, which numpy 2.5 no longer turns into an index.
        plain(tensor, *(() if scope is None else (scope,)))
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    interpreter._patch_lang_tensor = patch
    dot = interpreter.InterpreterBuilder.create_dot

    def wide_dot(self, a, b, *rest):
        # bfloat16 is kept as uint16 there, and multiplied as such.
        return dot(self, _widen(interpreter, a), _widen(interpreter, b), *rest)

    interpreter.InterpreterBuilder.create_dot = wide_dot


def _widen(interpreter, handle):
    import numpy as np
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
