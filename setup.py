"""Packaging of hf_compressm; settings of the tools are in `pyproject.toml`."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
PACKAGE = "hf_compressm"

INSTALL_REQUIRES = [
    "torch>=2.9",
    "transformers>=5.17",
    "accelerate",
    "huggingface-hub",
    "jinja2",
    "numpy",
    "pyyaml",
    "rich",
    "safetensors",
    "scipy",
    "tqdm",
    "typer",
]

EXPORT = ["onnx", "onnxruntime", "onnxscript"]
EXAMPLES = ["datasets", "evaluate", "matplotlib", "psutil", "scikit-learn"]
BENCH = [*EXAMPLES, "lm-eval"]

# The oracles are outside implementations that the tests compare with; the package itself never imports them.
ORACLES = ["pymor", "s5-pytorch", "slycot"]
TEST = [
    "hypothesis",
    "import-linter",
    "optuna",
    "peft",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "scipy",
    "tensorboard",
    "trackio",
    "trl",
    *ORACLES,
    *EXAMPLES,
    *EXPORT,
]

# Slow tests need lm-eval, parameterized (for transformers' own tests) and torchao. That one is in no other extra:
# beside a torch that it does not fit, transformers cannot be imported.
TOOLS = ["mypy", "parameterized", "pre-commit", "ruff", "torchao", "types-PyYAML"]

EXTRAS_REQUIRE = {
    "bench": BENCH,
    "examples": EXAMPLES,
    "export": EXPORT,
    "plot": ["matplotlib"],
    "peft": ["peft"],
    "cuda": ["causal-conv1d", "kernels", "mamba-ssm"],
    "test": TEST,
    "dev": [*TEST, *BENCH, *TOOLS],
}


def read_version() -> str:
    """Reads `__version__` from the package as text: importing it would need torch before torch is installed."""
    source = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{PACKAGE}/__init__.py has no line of the form `__version__ = "1.2.3"`.')
    return match.group(1)


setup(
    name=PACKAGE,
    version=read_version(),
    description="Compress state-space models while they train, with the Hugging Face Trainer",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="state-space models, mamba, s5, lru, model order reduction, balanced truncation, transformers",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: ["py.typed", "reports/templates/*.jinja"]},
    entry_points={"console_scripts": [f"hf-compressm = {PACKAGE}.cli:main"]},
    python_requires=">=3.10,<3.14",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
