"""The C and C++ headers of ONNX Runtime, which none of its Python packages has."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from blockffn_compile.paths import cache_dir

VARIABLE = "BLOCKFFN_ORT_HEADERS"
#: Includes the others that are needed.
HEADER = "onnxruntime_cxx_api.h"

_SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} stable main\n"
_MIRROR = "https://deb.debian.org/debian"
_PACKAGE = "libonnxruntime-dev"


class HeadersError(RuntimeError):
    """There are no headers; the message says how to come by some."""


def find_headers(path: str | Path | None = None) -> Path:
    """The folder of ``onnxruntime_cxx_api.h``.

    Args:
        path: that folder; default: ``$BLOCKFFN_ORT_HEADERS``, else those of Debian's package
            ``libonnxruntime-dev``, which is downloaded once and unpacked under the user's cache
            folder.  Nothing is installed.

    Raises:
        HeadersError: the folder has no such file, or the package cannot be had.
    """
    if path := path or os.environ.get(VARIABLE):
        if not (Path(path) / HEADER).is_file():
            raise HeadersError(f"{path}: there is no {HEADER} in this folder")
        return Path(path)
    folder = cache_dir() / "onnxruntime-headers"
    headers = folder / "usr/include/onnxruntime"
    if not (headers / HEADER).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            unpacked = _download(Path(work))
            try:
                unpacked.rename(folder)
            except OSError:  # another process was faster
                if not (headers / HEADER).is_file():
                    raise
    return headers


def _download(work: Path) -> Path:
    """Unpacks Debian's package below ``work``, by apt, which checks Debian's signature."""
    for folder in ("state/lists/partial", "cache/archives/partial", "unpacked"):
        (work / folder).mkdir(parents=True)
    (work / "sources.list").write_text(_SOURCE.format(mirror=_MIRROR))
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "",
        "APT::Update::Post-Invoke": "",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    try:
        for command in ([*apt, "update"], [*apt, "download", _PACKAGE]):
            subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
        (package,) = work.glob("*.deb")
        unpack = ["dpkg-deb", "-x", str(package), "unpacked"]
        subprocess.run(unpack, cwd=work, check=True, capture_output=True, text=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise HeadersError(
            f"Debian's package {_PACKAGE} cannot be had from {_MIRROR} ({reason.strip()}); "
            f"set {VARIABLE} to a folder with ONNX Runtime's {HEADER}, version 1.21 or newer"
        ) from error
    return work / "unpacked"
