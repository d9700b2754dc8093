"""Builds the native CPU kernels (csrc/cpu) with pybind11, without torch.

Everything else about the project is in pyproject.toml. Without a working compiler the install still succeeds,
says so, and the library runs on its `torch` backend (`tuna info` shows why).
"""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CPU = Pybind11Extension(
    "tuna_kernels.native._cpu",
    sorted(glob("csrc/cpu/**/*.cpp", recursive=True)),
    include_dirs=["csrc/cpu"],
    depends=sorted(glob("csrc/cpu/**/*.h", recursive=True)),
    cxx_std=17,
)
CPU.optional = True  # setuptools goes on without it when the build fails

WINDOWS = sys.platform == "win32"
# Errors and traps of libm are never looked at, and asking for them would keep loops from being vectorised.
FLAGS = ["/O2"] if WINDOWS else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
OPENMP = ["/openmp:experimental"] if WINDOWS else ["-fopenmp"]
NO_OPENMP = [] if WINDOWS else ["-Wno-unknown-pragmas"]


class BuildNative(build_ext):
    """Try with OpenMP, then with one thread; say what it means when neither works."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        compile_args, link_args = [*ext.extra_compile_args, *FLAGS], list(ext.extra_link_args)
        try:
            ext.extra_compile_args, ext.extra_link_args = [*compile_args, *OPENMP], [*link_args, *OPENMP]
            return super().build_extension(ext)
        except Exception as error:
            print(f"tuna-kernels: no build of {ext.name} with OpenMP ({error}); trying without", file=sys.stderr)
        try:
            ext.extra_compile_args, ext.extra_link_args = [*compile_args, *NO_OPENMP], link_args
            return super().build_extension(ext)
        except Exception:
            print(
                "tuna-kernels: no native CPU kernels on this machine (is there a C++ compiler?). Everything works on "
                "the slower 'torch' backend; install a compiler and reinstall for full speed.",
                file=sys.stderr,
            )
            raise


setup(ext_modules=[CPU], cmdclass={"build_ext": BuildNative})
