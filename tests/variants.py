"""Every choice of a slot in float64 NumPy, from the papers: what `oracle.forward` is to LLaMA. Knows no JAX."""

import math

import numpy as np

from tests import oracle


def frequencies(head_dim, rope):
    """Radians a position of each pair: by wavelength, one at a time."""
    turning = rope.rotary_dim or head_dim
    result = []
    for i in range(0, head_dim, 2):
        theta = rope.theta
        if rope.scaling == "ntk":  # the slowest of d/2 pairs, i = d - 2, is stretched by the factor
            theta *= rope.factor ** (turning / (turning - 2))
        frequency = theta ** (-i / turning)
        if rope.scaling == "linear":
            frequency /= rope.factor
        if rope.scaling in ("llama3", "yarn"):
            ratio = rope.original_length * frequency / (2 * math.pi)
            low, high = rope.low_freq_factor, rope.high_freq_factor
            ramp = min(max((ratio - low) / (high - low), 0), 1)
            frequency = (1 - ramp) * frequency / rope.factor + ramp * frequency
        result.append(frequency if i < turning else 0.0)
    return np.array(result)


def alibi_bias(heads, distance):
    """For a power of two of heads (arXiv:2108.12409 section 3)."""
    return [-(2 ** (-8 * (n + 1) / heads)) * distance for n in range(heads)]


def t5_bucket(distance):
    """As in Mesh TensorFlow's transformer_layers.py, for a decoder: 32 buckets up to distance 128."""
    if distance < 16:
        return distance
    return min(16 + int(math.log(distance / 16) / math.log(128 / 16) * 16), 31)


def attention(q, k, v, segments, window, softcap, bias_of):
    """q [T, N, H], k and v [T, K, H]; bias_of(distance) -> one number a head."""
    T, N, H = q.shape
    group = N // k.shape[1]
    out = np.zeros_like(q)
    for n in range(N):
        for t in range(T):
            first = max(0, t - window + 1) if window else 0
            seen = [s for s in range(first, t + 1) if segments[s] == segments[t]]
            scores = np.array([q[t, n] @ k[s, n // group] / math.sqrt(H) for s in seen])
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            scores = scores + np.array([bias_of(t - s)[n] for s in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, n] = sum(w * v[s, n // group] for w, s in zip(weights, seen, strict=True))
    return out


def norm(kind, x, params, eps):
    if kind == "rms":
        return oracle.rms_norm(x, params["scale"], eps)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return normed * params["scale"] + params["bias"] if kind == "layer" else normed


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def relu(x):
    return np.maximum(x, 0)


FFNS = {
    "swiglu": (oracle.silu, True),
    "geglu": (gelu, True),
    "reglu": (relu, True),
    "gelu": (gelu, False),
    "relu": (relu, False),
    "relu2": (lambda x: relu(x) ** 2, False),
}


def ffn(kind, x, params):
    activate, is_gated = FFNS[kind]
    wide = {
        name: x @ params[name] + params.get(f"{name}_bias", 0)
        for name in params
        if name in ("gate", "up")
    }
    hidden = activate(wide["gate"]) * wide["up"] if is_gated else activate(wide["up"])
    return hidden @ params["down"] + params.get("down_bias", 0)


def logits(model, params, tokens, positions, segments):
    """[T, V] of one row; params as the code stores them, in float64."""
    eps = model.norm_eps
    x = params["embed"][tokens]
    if model.position == "learned":
        x = x + params["positions"][positions]
    if model.position == "sinusoidal":
        x = x + [sinusoid(t, model.dim) * model.init_std * math.sqrt(2) for t in positions]
    if model.placement == "peri":
        x = norm(model.norm, x, params.get("embed_norm"), eps)
    layers = params["groups"]["self_0"]
    for i in range(model.layers):
        layer = _at(layers, i)
        of = lambda name, x: norm(model.norm, x, layer.get(name), eps)  # noqa: B023
        attend = lambda x: attended(model, x, layer["attention"], params, positions, segments)  # noqa: B023
        feed = lambda x: ffn(model.ffn, x, layer["ffn"])  # noqa: B023
        if model.placement == "pre":
            x = x + attend(of("attention_norm", x))
            x = x + feed(of("ffn_norm", x))
        elif model.placement == "post":
            x = of("attention_norm", x + attend(x))
            x = of("ffn_norm", x + feed(x))
        elif model.placement in ("sandwich", "peri"):
            x = x + of("attention_out_norm", attend(of("attention_norm", x)))
            x = x + of("ffn_out_norm", feed(of("ffn_norm", x)))
        else:
            h = of("attention_norm", x)
            x = x + attend(h) + feed(h)
    if model.placement != "post":
        x = norm(model.norm, x, params.get("norm"), eps)
    if model.init == "mup":
        x = x * model.mup_base_dim / model.dim
    return x @ params.get("output", params["embed"].T)


def attended(model, x, params, whole, positions, segments):
    q, k, v = (np.tensordot(x, params[name], 1) + params.get(f"{name}_bias", 0) for name in "qkv")
    if model.qk_norm != "none":
        q = norm(model.qk_norm, q, params.get("q_norm"), model.norm_eps)
        k = norm(model.qk_norm, k, params.get("k_norm"), model.norm_eps)
    if model.position == "rope":
        turns = frequencies(model.head_dim, model.rope)
        grow = 0.1 * math.log(model.rope.factor) + 1 if model.rope.scaling == "yarn" else 1
        for t, place in enumerate(positions):
            for heads in (q, k):
                for n in range(heads.shape[1]):
                    heads[t, n] = grow * oracle.rotate(heads[t, n], place, turns)
    bias_of = {
        "alibi": lambda distance: alibi_bias(model.heads, distance),
        "t5": lambda distance: whole["distances"][:, t5_bucket(distance)],
    }.get(model.position, lambda distance: np.zeros(model.heads))
    out = attention(q, k, v, segments, model.window, model.softcap, bias_of)
    return np.tensordot(out, params["o"], 2) + params.get("o_bias", 0)


def sinusoid(position, dim):
    """arXiv:1706.03762 section 3.5: sin at even entries, cos at odd ones."""
    angle = [position / 10_000 ** (i // 2 * 2 / dim) for i in range(dim)]
    return np.array([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angle)])


def _at(tree, i):
    return {
        name: _at(part, i) if isinstance(part, dict) else part[i] for name, part in tree.items()
    }
