"""Meta's params.json: the settings of a network, read and written.

It gives the feed-forward's width by a rule (2/3 of 4 x dim, times ffn_dim_multiplier, rounded up to
multiple_of), and neither the number of positions nor, as first published, the factor of rope scaling.
Source: ModelArgs and apply_scaling of Meta's llama-models (models/llama3/args.py, model.py).
"""

from pathlib import Path

from llama_jax import config
from llama_jax.convert import hf, json_file

# The kind of each setting. The second group may be absent, the third may also be null.
_REQUIRED = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
_OPTIONAL = {"multiple_of": int, "rope_theta": float, "use_scaled_rope": bool}
_NULLABLE = {
    **{"n_kv_heads": int, "head_dim": int, "ffn_dim_multiplier": float},
    **{"rope_scaling_factor": float, "rope_high_freq_factor": float},
}


def read(file: Path) -> dict:
    """The settings, each of its kind."""
    params = json_file.read(file)
    if "model" in params:
        params = json_file.value(params, "model", dict, file)
    missing = _REQUIRED.keys() - params.keys()
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}")
    kinds = {**_REQUIRED, **_OPTIONAL, **_NULLABLE}
    if type(params.get("vocab_size")) is not int or params["vocab_size"] not in (-1, 0):
        kinds["vocab_size"] = int  # both mean the tokenizer's
    for name, kind in kinds.items():
        if name in params and not (name in _NULLABLE and params[name] is None):
            params[name] = json_file.value(params, name, kind, file)
    return params


def rope_of(params: dict, tied: bool) -> tuple[config.Rope, tuple[str, ...]]:
    """Rotary settings, and a note if the factor had to be told from the kind of model."""
    theta = float(params.get("rope_theta", 10_000.0))
    if not params.get("use_scaled_rope"):
        return config.Rope(theta=theta), ()
    high = float(params.get("rope_high_freq_factor") or 4.0)
    factor = params.get("rope_scaling_factor")
    if factor is not None:
        return config.Rope(theta=theta, factor=float(factor), high_freq_factor=high), ()
    factor, whose = (32, "3.2 1B and 3B, tied") if tied else (8, "3.1, not tied")
    note = f"params.json gives no rope_scaling_factor: {factor}, that of Llama {whose}"
    return config.Rope(theta=theta, factor=float(factor), high_freq_factor=high), (note,)


def ffn_width(params: dict) -> int:
    width = 2 * 4 * params["dim"] // 3
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = params["multiple_of"]
    return -(-width // multiple) * multiple


def context_of(params: dict) -> int:
    """Positions trained for, by the papers: LLaMA 2048, Llama 2 4096, Llama 3 8192, 3.1 131072.

    Code Llama (arXiv:2308.12950 section 2.4): 16384, with a rotary base of 1e6.
    """
    if params.get("use_scaled_rope"):
        return 131_072
    if params.get("rope_theta", 10_000.0) == 500_000.0:
        return 8192
    if params.get("rope_theta", 10_000.0) == 1_000_000.0:
        return 16_384
    largest_of_llama1 = params["n_layers"] == 80 and not params.get("n_kv_heads")
    return 2048 if params["norm_eps"] == 1e-6 or largest_of_llama1 else 4096


def check_expressible(model: config.Model) -> None:
    """ValueError names the setting that Meta's format cannot hold."""
    hf.check_expressible(model, "Meta's", scalings=("llama3",))
    if model.head_dim * model.heads != model.dim:
        raise ValueError(
            f"model.head_dim={model.head_dim} x model.heads={model.heads} must be "
            f"model.dim={model.dim} in Meta's format; export with --format=hf or native"
        )
    rope = config.Rope()
    for name in ("low_freq_factor", "original_length"):
        if getattr(model.rope, name) != getattr(rope, name):
            raise ValueError(
                f"model.rope.{name}={getattr(model.rope, name)} cannot be said in Meta's params.json, "
                f"which means {getattr(rope, name)}; export with --format=hf or native"
            )


def params_of(model: config.Model) -> dict:
    """The params.json of a model."""
    params = {
        "dim": model.dim,
        **ffn_settings(model.dim, model.ffn_dim),
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads,
        "n_layers": model.layers,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope.theta,
        "vocab_size": model.vocab_size,
    }
    if model.rope.factor != 1.0:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": model.rope.factor}
        params |= {"rope_high_freq_factor": model.rope.high_freq_factor}
    return params


def ffn_settings(dim: int, ffn_dim: int) -> dict:
    """ffn_dim_multiplier and multiple_of that make this width by Meta's rule; published ones first."""
    for multiplier in (None, 1.0, 1.2, 1.3, 1.5):
        for multiple in (256, 1024, 4096):
            found = {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
            if ffn_width({"dim": dim, **found}) == ffn_dim:
                return {key: value for key, value in found.items() if value is not None}
    share = min(1.0, ffn_dim / (8 * dim // 3))  # then rounding up to the width itself gives it
    return {"multiple_of": ffn_dim, "ffn_dim_multiplier": share}
