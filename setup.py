"""Builds the extension slm_fast._C with CMake and Ninja. SLM_FAST_CUDA=0 leaves the CUDA parts out."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeExtension(Extension):
    def __init__(self, name: str):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "--fresh",  # a kept build folder remembers tools of an isolated build that are gone
            "-S",
            str(Path(__file__).resolve().parent),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        use_cuda = os.environ.get("SLM_FAST_CUDA", "1") != "0"
        result = subprocess.run([*configure, f"-DSLM_CUDA={'ON' if use_cuda else 'OFF'}"])
        if result.returncode != 0 and use_cuda:
            print("configuring with CUDA failed, building the CPU parts only", file=sys.stderr)
            subprocess.run([*configure, "-DSLM_CUDA=OFF"], check=True)
        elif result.returncode != 0:
            raise RuntimeError("CMake could not configure slm_fast._C")
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[CMakeExtension("slm_fast._C")], cmdclass={"build_ext": CMakeBuild})
