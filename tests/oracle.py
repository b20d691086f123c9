"""LLaMA in float64 NumPy, from the papers, with loops where the code has einsums. Knows no JAX."""

import math

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def llama3_frequencies(head_dim, theta, factor, low, high, original):
    """Meta's rule, one frequency at a time, by wavelength."""
    result = []
    for i in range(0, head_dim, 2):
        frequency = 1.0 / theta ** (i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            result.append(frequency)
        elif wavelength > original / low:
            result.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(result)


def rotate(x, position, frequencies):
    """One head vector as complex numbers: entry i with entry i + H/2, turned by position x frequency."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag])


def attention(q, k, v, segments):
    """q [T, N, H], k and v [T, K, H]: one row, one head and one query at a time."""
    T, N, H = q.shape
    group = N // k.shape[1]
    out = np.zeros_like(q)
    for n in range(N):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            scores = np.array([q[t, n] @ k[s, n // group] / math.sqrt(H) for s in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, n] = sum(w * v[s, n // group] for w, s in zip(weights, seen, strict=True))
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def forward(params, tokens, positions, segments, eps, frequencies):
    """Logits [T, V] of one row; params as the code stores them, in float64."""
    x = params["embed"][tokens]
    layers = params["groups"]["self_0"]
    for i in range(layers["attention"]["q"].shape[0]):
        layer = lambda *path: _at(layers, path)[i]  # noqa: B023
        h = rms_norm(x, layer("attention_norm", "scale"), eps)
        q, k, v = (np.tensordot(h, layer("attention", name), 1) for name in "qkv")
        for t, position in enumerate(positions):
            for heads in (q, k):
                for n in range(heads.shape[1]):
                    heads[t, n] = rotate(heads[t, n], position, frequencies)
        x = x + np.tensordot(attention(q, k, v, segments), layer("attention", "o"), 2)
        h = rms_norm(x, layer("ffn_norm", "scale"), eps)
        gated = silu(h @ layer("ffn", "gate")) * (h @ layer("ffn", "up"))
        x = x + gated @ layer("ffn", "down")
    return rms_norm(x, params["norm"]["scale"], eps) @ params.get("output", params["embed"].T)


def cross_entropy(logits, targets):
    """nats of each target."""
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
