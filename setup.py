"""Build the optional kernels: C files, compiled for each instruction set.

Without a compiler the package installs all the same and uses its PyTorch code.
`normlab.kernels` chooses among the variants when it is first used.

They are loaded by ctypes and use nothing of Python's: one wheel a platform serves every Python.
NORMLAB_KERNELS=0 leaves them out, which makes the wheel for all other platforms.
"""

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "default": [],
}
SOURCES = (
    *("kernels", "pixels", "dense", "pooled", "winograd2", "winograd4"),
    *(f"winograd{side}_{products}" for side in (2, 4) for products in ("bfloat16", "amx")),
)
HEADERS = ("amx", "bfloat16", "vectors", "winograd")
VARIANTS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"default": []}
# Compiled for OpenMP but not linked with a runtime: the symbols come from the one PyTorch loaded.
# Apple's Clang takes the option only so, and leaves symbols open where it is told to; this has not
# been run on a Mac.
OPENMP = {"linux": ["-fopenmp"], "darwin": ["-Xpreprocessor", "-fopenmp"]}
LINKED = {"darwin": ["-Wl,-undefined,dynamic_lookup"]}
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math"]

BUILD = sys.platform in OPENMP and os.environ.get("NORMLAB_KERNELS") != "0"


class Libraries(build_ext):
    """Libraries whose names tell no version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"


class Wheel(bdist_wheel):
    """A wheel for every Python, of one platform if it has kernels."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    cmdclass={"build_ext": Libraries, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            f"normlab.kernels._{name}",
            [f"src/normlab/kernels/{source}.c" for source in SOURCES],
            depends=[
                *(f"src/normlab/kernels/{header}.h" for header in HEADERS),
                *(f"src/normlab/kernels/winograd{side}.c" for side in (2, 4)),
            ],
            extra_compile_args=[*FLAGS, *OPENMP[sys.platform], *flags],
            extra_link_args=LINKED.get(sys.platform, []),
            optional=True,
        )
        for name, flags in VARIANTS.items()
        if BUILD
    ],
)
