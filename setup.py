"""Builds the native CPU kernels (csrc/cpu) with pybind11, without torch.

Everything else about the project is in pyproject.toml. Without a working compiler the installation succeeds with a
message, and the library uses its `torch` backend (`tuna info` shows why).
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
CPU.optional = True  # setuptools continues without it if the build fails

WINDOWS = sys.platform == "win32"
# libm errors and traps are not used, and supporting them would prevent vectorization.
FLAGS = ["/O2"] if WINDOWS else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
OPENMP = ["/openmp:experimental"] if WINDOWS else ["-fopenmp"]
NO_OPENMP = [] if WINDOWS else ["-Wno-unknown-pragmas"]


class BuildNative(build_ext):
    """Builds with OpenMP, else single-threaded; explains the consequences if both fail."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        compile_args, link_args = [*ext.extra_compile_args, *FLAGS], list(ext.extra_link_args)
        try:
            ext.extra_compile_args, ext.extra_link_args = [*compile_args, *OPENMP], [*link_args, *OPENMP]
            return super().build_extension(ext)
        except Exception as error:
            print(f"tuna-kernels: building {ext.name} with OpenMP failed ({error}); trying without", file=sys.stderr)
        try:
            ext.extra_compile_args, ext.extra_link_args = [*compile_args, *NO_OPENMP], link_args
            return super().build_extension(ext)
        except Exception:
            print(
                "tuna-kernels: building the native CPU kernels failed (is there a C++ compiler?). Everything works on "
                "the slower 'torch' backend; install a compiler and reinstall for full speed.",
                file=sys.stderr,
            )
            raise


setup(ext_modules=[CPU], cmdclass={"build_ext": BuildNative})
