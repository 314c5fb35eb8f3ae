"""Wheels with compiled kernels, if LAYERCOMB_WHEEL_KERNELS=1. All else is in setup.cfg."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WITH_KERNELS = os.environ.get('LAYERCOMB_WHEEL_KERNELS', '0') == '1'


class BuildPy(build_py):
    """Adds the libraries to what is installed; an editable installation is left alone."""

    def run(self):
        super().run()
        built = Path(self.build_lib) / 'layercomb_kernels' / 'built'
        shutil.rmtree(built, ignore_errors=True)  # of a wheel that was made here before
        if WITH_KERNELS and not self.editable_mode:
            sys.path.insert(0, str(Path(__file__).resolve().parent))
            from layercomb_kernels import build, packaged

            try:
                packaged.make(built)
            except (build.Unavailable, OSError, subprocess.SubprocessError) as e:
                sys.exit(f'no wheel with kernels: {e}')


class Platform(Distribution):
    """What is installed is for one kind of machine, if it has kernels."""

    def has_ext_modules(self):
        return WITH_KERNELS or super().has_ext_modules()


class Wheel(bdist_wheel):
    """A wheel with kernels is for every Python, since they know nothing of it."""

    def get_tag(self):
        tag = super().get_tag()
        return ('py3', 'none', tag[2]) if WITH_KERNELS else tag


setup(
    distclass=Platform,
    cmdclass={'build_py': BuildPy, 'bdist_wheel': Wheel},
    setup_requires=['jax >= 0.10.2'] if WITH_KERNELS else [],  # its headers
)
