"""Hugging Face directories: config.json, and weights in safetensors or torch's .bin, whole or in shards.

transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`; both are read, both
are written, with the same numbers.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.convert import json_file, names, pth, safetensors
from llama_jax.convert.names import Unit
from llama_jax.convert.source import CheckpointSource, TokenizerFile, compute_dtype, naming
from llama_jax.convert.stored import TABLES, Stored

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD_BYTES = 5 * 10**9  # of one file on export, as transformers 4 wrote
# Small files that tell how to use the weights; they leave as they came. But config.json is written anew,
# with the special ids of the old one.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
CARRIED = ("config.json", "generation_config.json", *TOKENIZER)


def open_folder(folder: Path, tokenizer: TokenizerFile | None) -> CheckpointSource:
    settings = json_file.read(folder / "config.json")
    model, context = model_of(settings, folder / "config.json")
    found = _named(_tensors(folder))
    if model.output == "tied" and _EMBED not in found and _HEAD in found:
        found[_EMBED] = found.pop(_HEAD)  # safetensors keeps one name of two, the first
    if model.layers > len(found):
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers={model.layers} is beyond the {len(found)} "
            "tensors that the files hold"
        )
    stored = {}
    for unit in names.units(model):
        if unit.hf not in found:
            raise ValueError(f"{folder} lacks {unit.hf}{_instead(settings, found)}")
        stored[unit.hf] = found.pop(unit.hf)
        stored[unit.hf].check_shape(names.torch_shape(unit.row, model))
    if model.output == "tied":
        _drop_copy(found, stored[_EMBED])
    for name, tensor in found.items():
        raise ValueError(
            f"{tensor.file}: {name} is not a tensor of a text LLaMA{_architecture(settings)}"
        )
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    return CheckpointSource(
        "hf",
        dataclasses.replace(model, compute_dtype=compute_dtype(dtypes)),
        context,
        dtypes,
        functools.partial(_read, stored),
        lambda unit: stored[unit.hf].file,
        (folder / "config.json", *sorted({_chosen(folder), *(t.file for t in stored.values())})),
        tokenizer,
        carried={n: (folder / n).read_bytes() for n in CARRIED if (folder / n).is_file()},
        notes=(f"{len({t.file for t in stored.values()})} weight file(s)", *_note(model, settings)),
    )


def _note(model: config.Model, settings: dict[str, Any]) -> tuple[str, ...]:
    """Both numbers are published as max_position_embeddings: DeepSeek-Coder's is the stretched one."""
    positions = settings.get("max_position_embeddings")
    if model.rope.scaling != "linear" or not positions or settings.get("max_sequence_length"):
        return ()
    return (
        f"rope scaling linear by {model.rope.factor:g}: if the {positions:g} positions of config.json are "
        f"those before it, give --context={positions * model.rope.factor:.0f}",
    )


_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What wrappers of modules put into names: torch.compile, FSDP and recomputation, anywhere; DDP, in front.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def _named(found: dict[str, Stored]) -> dict[str, Stored]:
    """Under LlamaForCausalLM's names; those of a LlamaModel saved alone lack "model."."""
    named: dict[str, Stored] = {}
    alone = not any("model." in name for name in found)
    for name, tensor in found.items():
        ours = name
        for wrapper in _WRAPPERS:
            ours = ours.replace(wrapper, "")
        ours = ours.removeprefix("module.")
        if alone and ours.startswith(("embed_tokens.", "layers.", "norm.")):
            ours = f"model.{ours}"
        if ours in named:
            raise ValueError(f"{tensor.file}: {named[ours].name} and {name} are both {ours}")
        named[ours] = tensor
    return named


def _architecture(settings: dict[str, Any]) -> str:
    """Of what class the weights were saved, where config.json names another one."""
    names = settings.get("architectures")
    if not isinstance(names, list) or names in ([], ["LlamaForCausalLM"]):
        return ""
    return f"; config.json names {json_file.shown(names[0])}, of which only LlamaForCausalLM is read here"


def _instead(settings: dict[str, Any], found: dict[str, Stored]) -> str:
    """What is there that was not asked for."""
    names = sorted(found)
    more = f"; it holds {', '.join(names[:3])}{', ...' if names[3:] else ''}" if names else ""
    return more + _architecture(settings)


def _drop_copy(found: dict[str, Stored], embed: Stored) -> None:
    """An output matrix beside a tied embedding must be a copy: another one would be lost."""
    own = found.pop("lm_head.weight", None)
    if own and not own.same(embed):
        raise ValueError(
            f"{own.file}: {own.name} differs from {embed.name}, to which config.json ties it; set "
            "tie_word_embeddings to false there, or take the tensor out"
        )


def _read(stored: dict[str, Stored], unit: Unit, start: int, stop: int) -> np.ndarray:
    return stored[unit.hf].rows(start, stop)


def _chosen(folder: Path) -> Path:
    """The file of weights, or their index."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has none of {', '.join(WEIGHTS)}")


def _tensors(folder: Path) -> dict[str, Stored]:
    """{name: where it lies} of all files."""
    name = _chosen(folder).name
    if not name.endswith(".index.json"):
        return _header(folder / name)
    where = json_file.read(folder / name).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{folder / name} must have a weight_map of tensor -> file")
    for shard in where.values():
        if not isinstance(shard, str) or shard != Path(shard).name or shard in ("", ".", ".."):
            raise ValueError(
                f"{folder / name} points to {json_file.shown(shard)}, which is not a file beside it"
            )
    found: dict[str, Stored] = {}
    for shard in dict.fromkeys(where.values()):
        if not (folder / shard).is_file():
            raise ValueError(
                f"{folder / shard} is missing; {name} puts {_first(where, shard)} in it"
            )
        for tensor, stored in _header(folder / shard).items():
            if tensor in found:
                raise ValueError(
                    f"{tensor} is in {found[tensor].file.name} and in {folder / shard}"
                )
            found[tensor] = stored
    for tensor, shard in where.items():
        if tensor.endswith(TABLES):
            continue
        if tensor not in found or found[tensor].file.name != shard:
            raise ValueError(f"{folder / shard} lacks {tensor}, which {name} puts there")
    return found


def _first(where: dict[str, str], shard: str) -> str:
    return next(tensor for tensor, file in where.items() if file == shard)


def _header(file: Path) -> dict[str, Stored]:
    return (safetensors.read_header if file.suffix == ".safetensors" else pth.read_names)(file)


def model_of(settings: dict[str, Any], file: Path) -> tuple[config.Model, int]:
    """The settings in a config.json, and the number of positions. Absent ones have transformers' defaults.

    ValueError names what this code does not compute.
    """
    kind = settings.get("model_type")
    if kind != "llama":
        raise ValueError(
            f"{file}: model_type={json_file.shown(kind)} must be 'llama', the text models"
        )
    for name, only in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        _only(settings, name, only, file)
    for name in ("attention_bias", "mlp_bias"):
        if settings.get(name):
            raise ValueError(
                f"{file}: {name}={json_file.shown(settings[name])} must be false: no LLaMA has biases in its "
                "linear layers, those of a checkpoint are not read here, and without them it is another "
                "network; set it to false only where the weights hold none"
            )
    if settings.get("quantization_config"):
        raise ValueError(
            f"{file}: quantization_config={json_file.shown(settings['quantization_config'])}: quantised "
            "checkpoints are not read; dequantise it first, or take the weights that it was made from"
        )
    values = {
        ours: _value(settings, theirs, kind, file) for ours, (theirs, kind) in _SETTINGS.items()
    }
    heads = values["heads"]
    values["kv_heads"] = values["kv_heads"] or heads
    values["head_dim"] = values["head_dim"] or values["dim"] // heads
    tied = values.pop("tied")
    # Vicuna's of 16k positions say so here; max_position_embeddings is what it was before.
    context = max(values.pop("context"), _value(settings, "max_sequence_length", 0, file))
    rope = rope_of(settings, file)
    with naming(file):
        model = config.Model(**values, rope=rope, output="tied" if tied else "untied")
    return model, context


def _only(settings: dict[str, Any], name: str, only: Any, file: Path) -> None:
    if settings.get(name) is not None and settings[name] != only:
        raise ValueError(
            f"{file}: {name}={json_file.shown(settings[name])} is not LLaMA's; only {only!r} is "
            "computed here"
        )


# Our name: theirs, and the kind of its value or the default that transformers has.
_SETTINGS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", int),
    "dim": ("hidden_size", int),
    "layers": ("num_hidden_layers", int),
    "heads": ("num_attention_heads", int),
    "kv_heads": ("num_key_value_heads", 0),
    "head_dim": ("head_dim", 0),
    "ffn_dim": ("intermediate_size", int),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "init_std": ("initializer_range", 0.02),
    "tied": ("tie_word_embeddings", False),
    "context": ("max_position_embeddings", 2048),
}


def _value(settings: dict[str, Any], name: str, default: Any, file: Path) -> Any:
    required = isinstance(default, type)
    if settings.get(name) is None and not required:
        return default
    if name == "initializer_range" and settings[name] == 0:  # how training began matters no more
        return default
    return json_file.value(settings, name, default if required else type(default), file)


def rope_of(settings: dict[str, Any], file: Path) -> config.Rope:
    """Both spellings of transformers; ValueError if they disagree, or ask for a scheme that is not here."""
    new, old = settings.get("rope_parameters"), settings.get("rope_scaling")
    for scaling in (new, old):
        if scaling is not None and not isinstance(scaling, dict):
            raise ValueError(
                f"{file}: {json_file.shown(scaling)} must be an object of rope settings"
            )
    thetas = [
        json_file.value(said, "rope_theta", float, file)
        for said in (settings, new or {}, old or {})
        if said.get("rope_theta") is not None
    ]
    found = [_rope(new, thetas, file)] if new else []
    if not new or "rope_scaling" in settings:
        found.append(_rope(old or {}, thetas, file))
    if len(set(thetas)) > 1 or found[0] != found[-1]:
        raise ValueError(
            f"{file}: rope_parameters={json_file.shown(new)} contradicts "
            f"rope_theta={settings.get('rope_theta')} and rope_scaling={json_file.shown(old)}"
        )
    return found[0]


def _rope(scaling: dict[str, Any], thetas: list[float], file: Path) -> config.Rope:
    theta = thetas[0] if thetas else 10_000.0
    _only(scaling, "partial_rotary_factor", 1.0, file)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return config.Rope(theta=theta)
    if kind not in ("linear", "llama3"):
        reason = "is not computed here as transformers does"
        if kind == "dynamic":
            reason = "changes with the length of each text, which is not computed here"
        raise ValueError(
            f"{file}: rope_type={json_file.shown(kind)} of its rope scaling must be 'default', 'linear' or "
            f"'llama3'; it {reason}"
        )
    factor = json_file.value(scaling, "factor", float, file)
    bands = {
        ours: json_file.value(scaling, theirs, number, file)
        for ours, theirs, number in (
            ("low_freq_factor", "low_freq_factor", float),
            ("high_freq_factor", "high_freq_factor", float),
            ("original_length", "original_max_position_embeddings", int),
        )
        if kind == "llama3"
    }
    if factor == 1.0:
        return config.Rope(theta=theta)
    with naming(file):
        return config.Rope(theta=theta, factor=factor, scaling=kind, **bands)


# Out.


def check_expressible(
    model: config.Model, whose: str = "Hugging Face's", scalings: tuple = ("llama3", "linear")
) -> None:
    """ValueError names the first setting that LlamaForCausalLM has no word for."""
    ours, usual = _flat(model), _flat(config.Model())
    for name in LLAMAS:
        allowed = scalings if name == "rope.scaling" else (usual[name],)
        if ours[name] not in allowed:
            raise ValueError(
                f"model.{name}={ours[name]!r} cannot be said in {whose} format, whose models "
                f"have {' or '.join(map(repr, allowed))}; export with --format=native"
            )


# Settings of which the formats of others know LLaMA's value alone, but for rope.scaling.
LLAMAS = (
    *("pattern", "norm", "placement", "qk_norm", "position", "rope.rotary_dim", "rope.scaling"),
    *("window", "softcap", "bias", "ffn", "mup_base_dim"),
)


def _flat(model: config.Model) -> dict[str, Any]:
    rope = {f"rope.{name}": value for name, value in config.to_dict(model.rope).items()}
    return config.to_dict(model) | rope


def settings_of(model: config.Model, context: int, dtype: np.dtype, ids: dict) -> dict[str, Any]:
    """The config.json of a model, for transformers 4 and 5. ids: bos_token_id and the like."""
    rope, scaling = model.rope, None
    if rope.factor != 1.0:
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if scaling and rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": context,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.output == "tied",
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": rope.theta},
        "torch_dtype": dtype.name,
        "dtype": dtype.name,
        "use_cache": True,
        "transformers_version": "4.45.0",  # the oldest that reads all of this
        **ids,
    }


def shards_of(sizes: dict[str, int]) -> dict[str, list[str]]:
    """{file: its tensors}, in order, each file within SHARD_BYTES unless one tensor alone is larger."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if groups[-1] and filled + nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups)}
