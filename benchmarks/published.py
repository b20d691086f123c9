"""Training runs of LLaMA on TPUs that others published, and the runs of this project that stand beside them.

A figure is compared where its mesh and remat policy can be said here, or nearly (`differs`); the others are
listed. Recipes: github.com/AI-Hypercomputer/tpu-recipes at c8cfe2f, training/; MaxText: its docs and configs
at e591f30. MaxText counted the whole square of attention's scores until July 2025, and only the causal half,
as this project does, since then.
"""

from collections.abc import Callable
from typing import NamedTuple

from llama_jax import config


class Published(NamedTuple):
    """One run, in bfloat16 unless its slice says otherwise."""

    network: str  # a config file
    slice: str
    seq_len: int
    tokens: float  # a second and chip
    said: str  # MFU, or TFLOP/s a chip, as published
    square: str  # of the scores, what the published figure counts: "whole" or "half"
    recipe: str  # mesh, what the backward pass finds stored, rows a chip
    source: str
    differs: str = ""  # what is compiled here, where it is not the recipe; or why nothing is
    fitted: bool = False  # whether roofline.RATES come from it
    outside: str = ""  # why the bracket misses it


def ours(one: Published) -> Callable[[], config.Run]:
    """What is compiled to stand beside one of COMPARED."""
    from benchmarks.scale import micro

    return {
        ("llama2_70b", "v5p_1024"): lambda: micro(
            "llama2_70b", "v5p_1024", 4, "attention", 4096, 8, data=4, fsdp=128
        ),
        ("llama31_405b", "v5p_1024"): lambda: micro(
            "llama31_405b", "v5p_1024", 4, "full", 8192, 8, tensor=4
        ),
        ("llama31_8b", "v6e_8"): lambda: micro("llama31_8b", "v6e_8", 4, "full", 8192, 16),
        ("llama31_8b", "v6e_64"): lambda: micro("llama31_8b", "v6e_64", 4, "full", 8192, 16),
        ("llama31_8b", "v6e_256"): lambda: micro(
            "llama31_8b", "v6e_256", 2, "full", 8192, 8, data=4
        ),
        ("llama31_70b", "v6e_256"): lambda: micro(
            "llama31_70b", "v6e_256", 1, "full", 8192, 8, data=2
        ),
        ("llama31_405b", "v6e_256x2"): lambda: micro(
            "llama31_405b", "v6e_256x2", 1, "full", 8192, 8, tensor=8
        ),
        ("llama31_70b", "v7x_128"): lambda: micro(
            "llama31_70b", "v7x_128", 2, "attention", 8192, 16
        ),
    }[one.network, one.slice]


_SHARDS = "of 4,096 over 256 chips a shard has 16 rows, which the compiler all-reduces"
_HOST = "FSDP; layer inputs, q, k and v kept by the host"
COMPARED = (
    Published(
        "llama2_70b", "v5p_1024", 4096, 692, "65.4%", "whole",
        "FSDP; q, k, v and what o and down make; 4 rows", "MaxText, docs/reference/models/tiering.md",
        "stores attention's result instead of o's and down's; FSDP 128 x data 4",
    ),
    Published(
        "llama31_405b", "v5p_1024", 8192, 124.6, "314.5 TFLOP/s", "half",
        "2 rows; mesh and policy are not in the recipe's text", "recipes, v5p/Llama3.1-405B-MaxText",
        "full recomputation, 1 row a chip, FSDP 128 x tensor 4", fitted=True,
    ),
    Published(
        "llama31_8b", "v6e_8", 8192, 7700, "43.3%", "half",
        "FSDP; layer inputs alone; 4 rows",
        "vlasenkoalexey.github.io, TPU model performance auto-optimization (June 2026)",
    ),
    Published(
        "llama31_8b", "v6e_8", 8192, 7139, "45.0%", "whole",
        f"{_HOST}, and what o makes; 3 rows", "recipes, trillium/Llama3.1-8B-MaxText/v6e-8",
        "full recomputation, 4 rows",
    ),
    Published(
        "llama31_8b", "v6e_64", 8192, 7247, "45.7%", "whole",
        f"{_HOST}, and what o makes; 4 rows", "recipes, trillium/Llama3.1-8B-MaxText/v6e-64",
        "full recomputation",
    ),
    Published(
        "llama31_8b", "v6e_256", 8192, 7207, "45.5%", "whole",
        f"{_HOST}, and what o makes; 4 rows", "recipes, trillium/Llama3.1-8B-MaxText/v6e-256",
        f"full recomputation, 2 rows, FSDP 64 x data 4 ({_SHARDS})", fitted=True,
    ),
    Published(
        "llama31_70b", "v6e_256", 8192, 960, "50.3%", "whole",
        f"{_HOST}; 5 rows", "recipes, trillium/Llama3.1-70B-MaxText/v6e-256",
        "full recomputation, 1 row, FSDP 128 x data 2",
    ),
    Published(
        "llama31_405b", "v6e_256x2", 8192, 149.5, "392.5 TFLOP/s", "half",
        "FSDP 256 a slice and 2 between slices; layer inputs kept by the host; 1 row",
        "recipes, trillium/Llama3.1-405B-MaxText",
        "full recomputation, 1 row for 8 chips, FSDP 32 x tensor 8, the state whole in each slice",
        outside="each slice holds the whole state (17.7 of 31.25 GiB a chip); FSDP between slices and layer "
        "inputs in the host's memory cannot be said here",
    ),
    Published(
        "llama31_70b", "v7x_128", 8192, 2687, "1,207 TFLOP/s", "half",
        "FSDP; layer inputs, q, k, v and attention's result; 4 rows (2 a device)",
        "recipes, ironwood/llama3.1-70b/8k-bf16-tpu7x-4x4x4",
    ),
)  # fmt: skip
LISTED = (
    Published(
        "llama31_8b", "v6e_16", 8192, 7243, "45.7%", "whole", f"{_HOST}, and what o makes",
        "recipes, trillium/Llama3.1-8B-MaxText/v6e-16", "as on 8, 64 and 256 chips",
    ),
    Published(
        "llama2_70b", "v6e_256", 4096, 905, "43.8%", "whole", "FSDP; q, k and v kept by the host; 2 rows",
        "recipes, trillium/Llama2-70B-MaxText", "as 3.1 70B",
    ),
    Published(
        "llama31_70b", "v6e_32", 8192, 921, "48.3%", "whole", _HOST,
        "recipes, trillium/Llama3.1-70B-MaxText/v6e-32", "takes the host's memory",
    ),
    Published(
        "llama31_405b", "v6e_256", 8192, 123, "38.55%", "whole", "layer inputs kept by the host",
        "MaxText, docs/reference/models/tiering.md", "takes the host's memory",
    ),
    Published(
        "llama31_70b", "v7x_512", 8192, 2671, "1,200 TFLOP/s", "half", "as on 64 chips",
        "recipes, ironwood/llama3.1-70b/8k-bf16-tpu7x-4x8x8", "as on 64 chips",
    ),
    Published(
        "llama31_405b", "v7x_512", 8192, 499.8, "1,261 TFLOP/s", "half", "",
        "recipes, ironwood/llama3.1-405b/8k-bf16-tpu7x-4x8x8", "the policy takes the host's memory",
    ),
    Published(
        "llama31_70b", "v7x_512", 131_072, 963, "898 TFLOP/s", "half", "",
        "recipes, ironwood/llama3.1-70b/128k-bf16-tpu7x-4x8x8", "attention is most of it",
    ),
    Published(
        "llama31_70b", "v7x_512, fp8", 131_072, 1088, "1,014 TFLOP/s", "half", "",
        "recipes, ironwood/llama3.1-70b/128k-fp8-tpu7x-4x8x8", "no fp8 here",
    ),
    Published(
        "llama31_70b", "v7x_128, fp8", 8192, 4128, "1,854 TFLOP/s", "half", "",
        "recipes, ironwood/llama3.1-70b/8k-fp8-tpu7x-4x4x4", "no fp8 here",
    ),
    Published(
        "llama31_405b", "v7x_512, fp8", 8192, 763.5, "1,927 TFLOP/s", "half", "",
        "recipes, ironwood/llama3.1-405b/8k-fp8-tpu7x-4x8x8", "no fp8 here",
    ),
)  # fmt: skip
