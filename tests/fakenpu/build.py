"""Builds the simulated device's library, once for each version of its sources and of torch."""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCES = sorted((Path(__file__).parent / "device").glob("*.cpp"))
FOLDER = Path(__file__).parent / "build"
_FLAGS = (
    "-O0",
    "-std=c++20",
    "-fPIC",
    "-DTORCH_EXTENSION_NAME=fakenpu",
    "-DUSE_DISTRIBUTED",
    "-DUSE_C10D_GLOO",
)


def built() -> tuple[Path | None, str]:
    """The library's file, or None and the reason why there can be none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None, "no C++ compiler to build the simulated NPU with"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return None, "no headers of Python to build the simulated NPU with"
    library = FOLDER / f"{_digest(compiler)}.so"
    if not library.is_file():
        _build(compiler, library)
    return library, ""


def _digest(compiler: str) -> str:
    told = [torch.__version__, sysconfig.get_python_version(), compiler, *_FLAGS]
    digest = hashlib.sha256("\n".join(told).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, library: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    headers = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        compiling = [  # all at once, as each takes as long
            subprocess.Popen([compiler, *_FLAGS, abi, *headers, "-c", str(source), "-o", str(made)])
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        failed = [process for process in compiling if process.wait()]
        if failed:
            raise RuntimeError("the simulated NPU does not compile; the compiler says why above")
        linked = Path(folder) / library.name
        places = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        names = ("-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python")
        subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(linked), *places, *names], check=True)
        os.replace(linked, library)


if __name__ == "__main__":
    print(*built())
