"""Packaging: `kernels/` is installed as `fastsnap.kernels`."""

import re
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).parent
# What this project meets other people's tools with: to write ONNX files and run them for comparison, and the loops
# that a SnapshotRecorder goes into.
ONNX = ["onnx>=1.17,<2", "onnxscript>=0.5.4,<1", "onnxruntime>=1.20,<2"]
TIMM = ["timm>=1,<2"]
LIGHTNING = ["lightning>=2.6,<3"]
TRANSFORMERS = ["transformers>=5,<6", "accelerate>=1.1,<2"]
TENSORBOARD = ["tensorboard>=2.16,<3"]
ROOMS = ("ensemble", "training", "data", "nets")
PROBE = "#include <omp.h>\n#include <vector>\nint threads() { return std::vector<int>{omp_get_max_threads()}[0]; }\n"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fastsnap" / "__init__.py").read_text())[1]


class BuildKernels(build_ext):
    """Where no C++ compiler works, says so and installs without the kernels: PyTorch then does their work.

    Errors in the kernels themselves go on being errors.
    """

    def build_extension(self, ext: Extension) -> None:
        problem = self._compiler_problem(ext)
        if problem is None:
            super().build_extension(ext)
        else:
            ext.optional = True  # nobody asks for the file then
            print(
                f"fastsnap: installing without its C++ kernels, no C++ compiler with OpenMP works here: {problem}"
            )

    def _compiler_problem(self, ext: Extension) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(PROBE)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=ext.extra_compile_args
                )
                self.compiler.link_shared_object(
                    objects,
                    str(Path(folder) / "probe.so"),
                    extra_postargs=ext.extra_link_args,
                    target_lang="c++",
                )
            except (CCompilerError, OSError) as error:
                return str(error)
        return None


setup(
    name="fastsnap",
    version=VERSION,
    description="Train snapshot ensembles fast: one training run, M networks, one table of what they are worth",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # By hand: `kernels` is a popular name on PyPI, so it must never be installed as a top-level package.
    packages=["fastsnap", *(f"fastsnap.{room}" for room in ROOMS), "fastsnap.kernels"],
    package_dir={"fastsnap": "fastsnap", "fastsnap.kernels": "kernels"},
    package_data={"fastsnap": ["py.typed", "ensemble/page.html"]},
    cmdclass={"build_ext": BuildKernels},
    # A plain shared library behind ctypes: needs neither Python's nor torch's headers, only a C++ compiler. A fused
    # multiply-add happens where one is written and nowhere else, so that all machines round alike.
    ext_modules=[
        Extension(
            "fastsnap.kernels._cpu",
            sources=[
                "kernels/instructions.cpp",
                "kernels/update_cpu.cpp",
                "kernels/averaging_cpu.cpp",
                "kernels/batch_norm_cpu.cpp",
                "kernels/convolution_cpu.cpp",
                "kernels/winograd_cpu.cpp",
                "kernels/resized_crop_cpu.cpp",
            ],
            depends=["kernels/instructions.h", "kernels/cpu.h", "kernels/lanes.h", "kernels/winograd.h"],
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
        )
    ],
    install_requires=[
        "torch>=2.9,<2.15",
        "torchvision>=0.24,<0.30",
        "numpy>=1.26,<3",
        "pillow>=10.3,<14",
        "safetensors>=0.4.5,<1",
        "msgspec>=0.19,<1",
        "rich>=13.7,<16",
        "matplotlib>=3.8,<4",
        "jinja2>=3.1.3,<4",
        "scikit-learn>=1.4,<2",
        "scipy>=1.11,<2",
    ],
    extras_require={
        # The wheel must match torch's CUDA; without one, the PyTorch pipeline gives the same batches.
        "dali": ["nvidia-dali-cuda130>=1.52,<3; platform_system == 'Linux'"],
        "bench": ONNX,
        "onnx": ONNX,
        "timm": TIMM,
        "lightning": LIGHTNING,
        "transformers": TRANSFORMERS,
        "tensorboard": TENSORBOARD,
        # Without a window, for the tests of report.html; its wheels are not for every system.
        "browser": ["PySide6-WebEngine>=6.12,<7"],
        "test": [
            *ONNX,
            *TIMM,
            *LIGHTNING,
            *TRANSFORMERS,
            *TENSORBOARD,
            "pytest>=8.2,<10",
            "torchmetrics>=1,<2",
            "hypothesis>=6.100,<7",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "setuptools>=64",  # builds the wheel that the tests look into
        ],
    },
)
