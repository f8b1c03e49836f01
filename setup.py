"""Installs megamtp and its commands. This file has version ranges; requirements.lock has the tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("megamtp").joinpath("__init__.py").read_text())[1]

setup(
    name="megamtp",
    version=VERSION,
    description="Pretrains multi-token-prediction language models on DeepSpeed",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["megamtp", "megamtp.*"]),
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "protobuf>=5",
        "psutil>=5.9",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tensorboard>=2.15",
        "tqdm>=4.66",
        "transformers>=4.56",
    ],
    extras_require={
        "data": ["pyarrow>=16", "zstandard>=0.22"],
        "mpi": ["mpi4py>=4", "mpich>=5"],
        "test": [
            "hypothesis>=6",
            "import-linter>=2",
            "megatron-core>=0.16",
            "mpi4py>=4",
            "mpich>=5",
            "mypy>=2.4",
            "pyarrow>=16",
            "pytest>=8",
            "pytest-timeout>=2",
            "pytest-xdist>=3",
            "ruff>=0.9",
            "zstandard>=0.22",
        ],
    },
    entry_points={
        "console_scripts": [
            "megamtp-pretrain=megamtp.pretrain:entry",
            "megamtp-prepare-data=megamtp.commands.prepare_data:entry",
            "megamtp-convert=megamtp.commands.convert_checkpoint:entry",
            "megamtp-generate=megamtp.commands.generate:entry",
            "megamtp-plan=megamtp.commands.plan:entry",
            "megamtp-report=megamtp.commands.report:entry",
        ]
    },
)
