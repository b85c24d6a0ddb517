"""Packaging. `pip install -c constraints.txt -e '.[dev]'` installs the tested set."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / "minigpt" / "version.py").read_text(encoding="utf-8"), VERSION)

EXTRAS = {
    "plot": ["matplotlib>=3.8"],
    "serve": ["fastapi>=0.115", "pydantic>=2.7", "uvicorn>=0.30"],
    "tensorboard": ["tensorboard>=2.16"],
    "wandb": ["wandb>=0.17"],
    "parquet": ["pyarrow>=15"],
    "curation": ["sentence-transformers>=3"],
}
TEST = [
    *("pytest>=8", "pytest-xdist>=3.6", "transformers>=4.50", "jinja2>=3.1", "regex", "openai>=1.40", "httpx>=0.27"),
    *("schemathesis>=4", "psutil>=5.9"),
    *(
        requirement
        for extra in ("curation", "parquet", "plot", "serve", "tensorboard")
        for requirement in EXTRAS[extra]
    ),
]

setup(
    name="minigpt",
    version=VERSION["__version__"],
    description="GPT-2 from raw text to a model that follows instructions, in plain PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["minigpt", "minigpt.*"]),
    package_data={
        "minigpt": [
            *("py.typed", "assets/*.txt", "assets/*.jsonl", "assets/*.tiktoken"),
            *("evaluation/*.html", "serving/web/*", "selfinstruct/report/web/*"),
        ]
    },
    install_requires=[
        "torch>=2.5",
        "numpy>=2.0",  # bitwise_count
        "tiktoken>=0.7",
        "safetensors>=0.4.3",
        # Not 0.17.6-0.18.2 (issue 7718) nor 0.18.3-0.19.3 (8224): their ZeRO-2 gradients were wrong without a word.
        "deepspeed>=0.19.4,<0.20; sys_platform == 'linux'",
        "rouge-score>=0.1.2",
        "tqdm>=4.66",
        "huggingface_hub>=0.30",  # downloads, cache, offline mode
        "tyro>=0.9.2",  # dataclass -> flags and help
        "docstring-parser>=0.16",  # the help texts under the fields, as tyro reads them
        "pyyaml>=6",
    ],
    extras_require={
        **EXTRAS,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.8", "mypy>=1.13", "types-PyYAML", "types-tqdm"],
        "all": sorted({requirement for extra in EXTRAS.values() for requirement in extra}),
    },
    classifiers=[
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
