"""Data in Debian packages."""

import subprocess
from pathlib import Path

from tqdm.auto import tqdm


def download(names: list[str], folder: Path) -> list[Path]:
    """The folders of Debian packages, downloaded and unpacked once; no root needed."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / name / "unpacked").is_file()]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=folder, check=True)
    for name in tqdm(missing, desc="unpack", unit="package"):
        package = next(folder.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, name], cwd=folder, check=True)
        package.unlink()
        (folder / name / "unpacked").touch()
    return [folder / name for name in names]
