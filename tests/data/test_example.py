import numpy as np
import pytest

from llama_jax.data import example


def test_records_are_those_of_tfds():
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    for length, dtype in ((3, np.uint16), (70, np.uint32), (9001, np.uint16)):
        tensor = tfds.features.Tensor(shape=(length,), dtype=dtype, encoding="bytes")
        features = tfds.features.FeaturesDict({"tokens": tensor, "segments": tensor})
        values = {name: rng.integers(0, 60_000, length).astype(dtype) for name in features}
        theirs = features.serialize_example(values)
        ours = example.encode({name: value.tobytes() for name, value in values.items()})
        assert len(ours) == len(theirs)
        decoded, through_tfds = example.decode(theirs), features.deserialize_example_np(ours)
        for name, value in values.items():
            np.testing.assert_array_equal(np.frombuffer(decoded[name], dtype), value)
            np.testing.assert_array_equal(through_tfds[name], value)


def test_other_bytes_are_refused():
    good = example.encode({"tokens": b"x" * 300})
    for bad in (b"", b"\x00", good[:-1], good + b"\x0a", b"\x08\x05", b"plain text, no record"):
        with pytest.raises(ValueError, match=f"a record of {len(bad)} bytes is not a tf.train.Ex"):
            example.decode(bad)
