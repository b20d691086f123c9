"""Packaging. requirements.txt pins what the suite passes with; the ranges here admit newer releases."""

from setuptools import find_packages, setup

setup(
    name="llama_jax",
    version="0.1.0",
    description="The LLaMA family in JAX, for research",
    packages=find_packages(include=["llama_jax", "llama_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "array_record>=0.8.6",
        "tensorflow-datasets>=4.9.10",
        "sentencepiece>=0.2.3",
        "tiktoken>=0.14",
        "ml_collections>=1.1",
        "absl-py",
        "matplotlib",
        "ml_dtypes",
        "numpy",
        "protobuf",
        "psutil",
        "pyarrow",
        "rich",
        "scipy",
        "tensorboardX",
        "tensorstore",
        "tqdm",
        "zstandard",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "prep": ["scikit-learn", "mwparserfromhell", "pylatexenc", "beautifulsoup4", "lxml"],
        # Derivatives whose tokenizer is a tokenizer.json alone.
        "tokenizers": ["tokenizers>=0.22"],
        # Chat templates of checkpoints. Older ones have holes in the sandbox that templates run in.
        "chat": ["jinja2>=3.1.6"],
        "eval": ["lm_eval>=0.4.13"],
        # The other side of parity tests, and of benchmarks. torch exactly so: another release brings
        # gigabytes of CUDA libraries.
        "parity": ["torch==2.13.0", "transformers>=5"],
        "bench": ["google-tunix>=0.1.7"],
        # basedpyright brings its checker and node in wheels; pyright fetches its own when it first runs.
        "dev": [
            *("pytest==9.2.0", "pytest-xdist==3.8.0", "pre-commit"),
            *("ruff==0.17.5", "basedpyright==1.40.2"),
        ],
    },
)
