"""What is packed for JSON comes back as it was."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compress.gate import answers
from compress.gate.answers import Answers, chosen, from_dict, packed, unpacked

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=5)


@given(arrays.arrays(st.sampled_from(["i1", "u1", "i2", "i4", "i8"]), SHAPES))
def test_whole_numbers_survive_in_as_few_bytes_as_hold_them(array):
    value = json.loads(json.dumps(packed(array)))
    found = unpacked(value)
    assert np.array_equal(found, array)
    assert found.dtype.itemsize <= max(2, array.dtype.itemsize)
    assert (found.dtype.itemsize == 1) == (array.dtype.itemsize == 1)


@given(arrays.arrays("f4", SHAPES))
def test_floats_survive_to_the_bit(array):
    found = unpacked(json.loads(json.dumps(packed(array))))
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"dtype": "<i2", "shape": [2], "data": "AA"},
        {"dtype": "<i2", "shape": [3], "data": "AAAAAA=="},
        {"dtype": "O", "shape": [1], "data": "AAAAAAAAAAA="},
        {"dtype": "<i2", "shape": [2], "data": "!!!!"},
        {"dtype": "no", "shape": [2], "data": "AAAA"},
    ],
)
def test_what_was_not_packed_is_refused(value):
    with pytest.raises((KeyError, TypeError, ValueError)):
        unpacked(value)


def test_answers_of_other_images_are_refused():
    labels = np.arange(5)
    good = Answers(labels, {"a": labels}, (0, 4)).as_dict()
    assert from_dict(good).sample == (0, 4)
    for damage in ({"top1": {"a": packed(labels[:4])}}, {"sample": [5]}, {"labels": packed(labels[:0])}):
        with pytest.raises(ValueError, match=r"answers|sample|labels"):
            from_dict(good | damage)


@given(st.integers(1, 5000), st.sampled_from([12_288, 602_112, 10**7]))
def test_a_sample_is_small_and_always_the_same(count, image_bytes):
    found = chosen(count, image_bytes)
    assert found == sorted(set(found)) == chosen(count, image_bytes)
    assert 0 <= found[0] <= found[-1] < count
    assert len(found) <= answers.SAMPLE_IMAGES
    assert len(found) * image_bytes <= max(answers.SAMPLE_BYTES, 4 * image_bytes)
    assert len(found) >= min(count, 4)
