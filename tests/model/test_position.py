import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.model import position
from tests import oracle


@pytest.mark.parametrize(
    ("theta", "factor"), [(10_000.0, 1.0), (500_000.0, 8.0), (500_000.0, 32.0)]
)
def test_frequencies_follow_metas_rule(theta, factor):
    rope = config.Rope(theta=theta, factor=factor)
    expected = oracle.llama3_frequencies(128, theta, factor, 1.0, 4.0, 8192)
    np.testing.assert_allclose(position.frequencies(128, rope), expected, rtol=1e-12)


def test_factor_32_differs_from_8_for_long_waves_only():
    eight, thirty_two = (
        position.frequencies(64, config.Rope(theta=5e5, factor=f)) for f in (8.0, 32.0)
    )
    assert eight[0] == thirty_two[0]
    assert eight[-1] / thirty_two[-1] == pytest.approx(4)


# float32 rounds an angle of 131,071 radians to 1/128.
@pytest.mark.parametrize(
    ("start", "atol"), [(0, 1e-5), (8_190, 6e-4), (80_000, 5e-3), (131_065, 1e-2)]
)
def test_rotation_is_complex_multiplication_at_any_position(start, atol):
    model = config.Model(head_dim=16, rope=config.Rope(theta=5e5, factor=32.0))
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 16))
    positions = np.stack([np.arange(start, start + 7), np.arange(7)])
    turns = position.rope_turns(model, jnp.asarray(positions))
    ours = position.rotate(jnp.asarray(x.transpose(0, 2, 1, 3), jnp.float32), turns)
    frequencies = oracle.llama3_frequencies(16, 5e5, 32.0, 1.0, 4.0, 8192)
    for b in range(2):
        for t in range(7):
            for n in range(3):
                expected = oracle.rotate(x[b, t, n], positions[b, t], frequencies)
                np.testing.assert_allclose(ours[b, n, t], expected, atol=atol)


def test_scores_depend_on_distance_alone():
    model = config.Model(head_dim=16)
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(at_q, at_k):
        turn = lambda x, p: position.rotate(x, position.rope_turns(model, jnp.full((1, 1), p)))
        return float(jnp.sum(turn(q, at_q) * turn(k, at_k)))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_rotation_agrees_with_a_recorded_torch_result(shared):
    """An interleaved implementation: its pairs (2i, 2i + 1) are our (i, i + H/2)."""
    x = np.load(shared("numerics/cs336_inputs.npz"))["in_embeddings"]
    expected = np.load(shared("numerics/cs336/test_rope.npz"))["array"]
    H = x.shape[-1]
    order = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])
    model = config.Model(head_dim=H, rope=config.Rope(theta=10_000.0))
    turns = position.rope_turns(model, jnp.arange(x.shape[1])[None].repeat(x.shape[0], 0))
    ours = position.rotate(jnp.asarray(x[..., order])[:, None], turns)[:, 0]
    np.testing.assert_allclose(ours, expected[..., order], atol=1e-5)


def test_no_position_leaves_queries_alone():
    x = jnp.arange(24.0).reshape(1, 3, 2, 4)
    assert position.rotate(x, position.none(None, jnp.zeros((1, 2)), 2).turns) is x


def test_alibi_has_the_slopes_of_the_paper():
    """arXiv:2108.12409 section 3: 1/2, 1/4, ..., 1/256 for 8 heads; for 12 every second one of 16 follows."""
    eight = 2.0 ** -np.arange(1, 9)
    np.testing.assert_allclose(position.alibi_slopes(8), eight, rtol=1e-12)
    more = 2.0 ** (-0.5 * np.array([1, 3, 5, 7]))
    np.testing.assert_allclose(position.alibi_slopes(12), [*eight, *more], rtol=1e-12)


def test_t5_has_the_buckets_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    distances = torch.arange(300)
    theirs = t5.T5Attention._relative_position_bucket(-distances, False, 32, 128)
    np.testing.assert_array_equal(position.t5_buckets(300), theirs.numpy())


def test_yarn_and_its_kind_agree_with_transformers():
    """Linear and NTK to the digit; YaRN ramps over pairs there, over turns in its paper: the ends agree."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    theta, factor, original = 10_000.0, 4.0, 2048

    def theirs(kind, **more):
        scaling = {"rope_type": kind, "factor": factor, "rope_theta": theta, **more}
        settings = transformers.LlamaConfig(
            hidden_size=64,
            num_attention_heads=1,
            max_position_embeddings=original,
            rope_parameters=scaling,
        )
        return utils.ROPE_INIT_FUNCTIONS[kind](settings, "cpu")

    linear = config.Rope(factor=factor, scaling="linear")
    np.testing.assert_allclose(position.frequencies(64, linear), theirs("linear")[0], rtol=1e-6)
    yarn = config.Rope(
        factor=factor, scaling="yarn", original_length=original, high_freq_factor=32.0
    )
    ours = position.frequencies(64, yarn)
    inverse, grow = theirs("yarn", original_max_position_embeddings=original)
    np.testing.assert_allclose(
        ours[[0, 1, 2, 3, -3, -2, -1]], inverse[[0, 1, 2, 3, -3, -2, -1]], rtol=1e-6
    )
    model = config.Model(head_dim=64, rope=yarn)
    cosine, _ = position.rope_turns(model, jnp.zeros((1, 1), int))
    assert float(cosine[0, 0, 0]) == pytest.approx(grow, rel=1e-6)
