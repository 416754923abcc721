"""Faults travel between processes and stay the line that they are."""

import pickle

import pytest

from xattn import errors


@pytest.mark.parametrize(
    "fault",
    [
        errors.ConfigError("seed: missing"),
        errors.UnknownNameError("model", "segformer_b00", ["segformer_b0"]),
        errors.DamageError("train-000000.tar, key a: crc32"),
        errors.CapacityError("too few"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_faults_survive_pickling(fault: errors.XattnError) -> None:
    again = pickle.loads(pickle.dumps(fault))
    assert str(again) == str(fault)
    assert again.exit_code == fault.exit_code
    assert isinstance(again, errors.XattnError)
    assert "\n" not in str(again)


def test_the_nearest_name_is_offered() -> None:
    near = errors.UnknownNameError("model", "segformer_b00", ["segformer_b0", "ssd300"])
    assert str(near) == "unknown model 'segformer_b00'; did you mean 'segformer_b0'?"
    far = errors.UnknownNameError("model", "x", ["b", "a"])
    assert str(far) == "unknown model 'x'; known: a, b"
