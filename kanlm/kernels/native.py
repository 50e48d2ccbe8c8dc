"""C++ as a shared library: compiled once for this machine, kept in a cache, called through ctypes.

Plain C with pointers needs no Python or torch headers, so any `c++`, `g++` or `clang++` with OpenMP will
do. The library uses the OpenMP runtime that torch has loaded already, hence torch's pool of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "kanlm_poison": "i",
    "kanlm_elementwise": "ppppppp l i",
    "kanlm_elementwise_gradient": "ppppppppppp l i",
    "kanlm_edge_few": "ppp l i",
    "kanlm_edge_pack": "pp llll i",
    "kanlm_edge_unpack": "pp llll i",
    "kanlm_edge_forward": "ppp llll ii ff i",
    "kanlm_edge_input_gradient": "pppp llll ii ff i",
    "kanlm_edge_coefficient_gradient": "ppp llll ii ff i",
}
_KINDS = {"p": _POINTER, "l": _INT64, "i": _INT, "f": _FLOAT}


class Few(ctypes.Structure):
    """struct Few of native.cpp."""

    _fields_ = [
        ("w", _POINTER),
        *((name, _INT64) for name in ("I", "O", "K")),
        *((name, _INT) for name in ("order", "G", "base")),
        *((name, _FLOAT) for name in ("lo", "inv_h")),
    ]


class Plan(ctypes.Structure):
    """struct Plan of native.cpp."""

    _fields_ = [
        *((name, _INT64) for name in ("C", "groups")),
        *((name, _INT) for name in ("kind", "order", "cells")),
        *((name, _FLOAT) for name in ("lo", "inv_h")),
        *((name, _INT) for name in ("silu", "normed")),
        ("eps", _FLOAT),
    ]


class NativeUnavailable(RuntimeError):
    """The library cannot be built or loaded here; the message says why."""


def _machine() -> str:
    """What `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        wanted = ("model name", "flags", "Features")
        lines = {line for line in cpuinfo.read_text().splitlines() if line.startswith(wanted)}
        return "\n".join(sorted(lines))
    return platform.machine() + platform.processor()


def cache_folder() -> Path:
    """`KANLM_KERNEL_CACHE`, else kanlm/kernels in the user's cache folder."""
    if folder := os.environ.get("KANLM_KERNEL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kanlm" / "kernels"


def _private(path: Path) -> Path:
    """`path` if it is this user's and only he may write it: what lies there is run without a question.

    Raises:
        NativeUnavailable: another user owns it or may write it.
    """
    status = path.stat()
    if not hasattr(os, "getuid"):  # Windows keeps a user's folders by other means
        return path
    if status.st_uid != os.getuid():
        raise NativeUnavailable(
            f"{path} belongs to another user; set KANLM_KERNEL_CACHE to a folder of yours"
        )
    if status.st_mode & 0o022:
        raise NativeUnavailable(f"{path} may be written by other users; chmod go-w {path}")
    return path


def _whole(library: Path) -> bool:
    """Whether `library` is there with the content that its name ends in: loading a part of one can crash."""
    if not library.exists():
        return False
    content = _private(library).read_bytes()
    return library.stem.endswith(hashlib.sha256(content).hexdigest()[:16])


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise NativeUnavailable(f"no C++ compiler found (looked for {', '.join(names)}); install g++ or set CXX")


def _built(source: Path | None = None) -> Path:
    """Path of the library of `source`, native.cpp by default.

    Compiles it unless this source with the headers beside it, compiler and machine have been seen before.
    """
    source = source or SOURCE
    compiler = _compiler()
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [compiler, *FLAGS, native]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    headers = sorted(source.parent.glob("*.h"))
    texts = [file.read_text() for file in (source, *headers)]
    key = hashlib.sha256("\0".join([*texts, *command, version, _machine()]).encode()).hexdigest()[:16]
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for library in _private(folder).glob(f"native-{key}-*.so"):
            if _whole(library):
                return library
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
    except OSError as error:
        raise NativeUnavailable(f"{folder} cannot be written ({error}); set KANLM_KERNEL_CACHE") from error
    try:
        result = subprocess.run([*command, str(source), "-o", temporary], capture_output=True, text=True)
        if result.returncode:
            first = next(
                (line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()
            )
            raise NativeUnavailable(f"{compiler} does not compile {source.name}: {first[:200]}")
        content = Path(temporary).read_bytes()
        library = folder / f"native-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"
        os.chmod(temporary, 0o700)  # the linker follows the umask, which may let a group write
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


@cache
def library() -> ctypes.CDLL:
    """native.cpp, loaded.

    Raises:
        NativeUnavailable: no compiler, no place to keep the result, or it does not compile.
    """
    return load(SOURCE, _SIGNATURES)


def load(source: Path, signatures: dict[str, str]) -> ctypes.CDLL:
    """The library compiled from `source`, whose functions return nothing.

    A signature has a letter an argument: p a pointer, l an int64, i an int, f a float.

    Raises:
        NativeUnavailable: as `library`.
    """
    try:
        loaded = ctypes.CDLL(str(_built(source)))
    except OSError as error:
        raise NativeUnavailable(f"the compiled library does not load: {error}") from error
    for name, signature in signatures.items():
        function = getattr(loaded, name)
        function.argtypes = [_KINDS[letter] for letter in signature.replace(" ", "")]
        function.restype = None
    return loaded


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a contiguous CPU tensor; None stays None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu", (
        tensor.shape,
        tensor.stride(),
        tensor.device,
    )
    return tensor.data_ptr()
