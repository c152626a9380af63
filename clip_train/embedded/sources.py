"""The packages that the pictures and words come from, by name and version, fetched with their own clients."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

VERSIONS = {
    "@iconify/json": "2.2.535",
    "cldr-annotations-full": "48.2.0",
    "cldr-annotations-derived-full": "48.2.0",
    "openclipart-svg": "1:0.18+dfsg-19",
}


@dataclass(frozen=True)
class Sources:
    """Where the unpacked sources lie."""

    iconify: Path
    annotations: Path
    annotations_derived: Path
    openclipart: Path


def prepare(folder: Path) -> Sources:
    """Fetch and unpack into `folder` what is not there yet (npm and apt-get, by package name).

    Raises:
        FileNotFoundError: a source is absent and its client (`npm`, `apt-get`) is not installed.
        subprocess.CalledProcessError: the client failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return Sources(
        iconify=_npm(folder, "@iconify/json") / "json",
        annotations=_npm(folder, "cldr-annotations-full") / "annotations/en/annotations.json",
        annotations_derived=_npm(folder, "cldr-annotations-derived-full") / "annotationsDerived/en/annotations.json",
        openclipart=_deb(folder, "openclipart-svg") / "usr/share/openclipart/svg",
    )


def _npm(folder: Path, package: str) -> Path:
    version = VERSIONS[package]
    unpacked = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}"
    if not unpacked.is_dir():
        archive = unpacked.with_name(unpacked.name + ".tgz")
        if not archive.is_file():
            run_client(["npm", "pack", "--silent", f"{package}@{version}"], folder)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
    return unpacked / "package"


def _deb(folder: Path, package: str) -> Path:
    unpacked = folder / "deb"
    if not (unpacked / "usr/share/openclipart").is_dir():
        if not list(folder.glob(f"{package}_*.deb")):
            run_client(["apt-get", "download", f"{package}={VERSIONS[package]}"], folder)
        (archive,) = folder.glob(f"{package}_*.deb")
        run_client(["dpkg-deb", "-x", str(archive.resolve()), str(unpacked.resolve())], folder)
    return unpacked


def run_client(command: list[str], folder: Path) -> None:
    """Run a package manager's command in a folder. Raises FileNotFoundError where it is not installed."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(
            f"{command[0]} is missing: run `{' '.join(command)}` elsewhere, put the file in {folder}"
        )
    subprocess.run(command, cwd=folder, check=True)
