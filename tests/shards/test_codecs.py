"""Codecs: pixels come back as they went in, and nothing but the expected image is accepted."""

from __future__ import annotations

import io

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from shards.codecs import CODECS, LEAD_BYTES, Codec, decode, decode_into, encode
from shards.errors import UserError

IMAGES = st.sampled_from([np.uint8, np.uint16]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))
)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=30)
@given(image_HW=IMAGES)
def test_pixels_come_back(codec: Codec, image_HW: np.ndarray) -> None:
    data = encode(image_HW, codec)
    back_HW = decode(data, codec, expect_hw=image_HW.shape, dtype=image_HW.dtype, name="x")
    assert back_HW.dtype == image_HW.dtype
    np.testing.assert_array_equal(back_HW, image_HW)
    assert encode(back_HW, codec) == data, "the same pixels give the same bytes"


def decode_between(data: bytes, codec: Codec, *, hw: tuple[int, int], dtype: type) -> np.ndarray:
    """Decode into memory between other bytes, which have to stay as they are."""
    num_bytes = hw[0] * hw[1] * np.dtype(dtype).itemsize
    memory = np.full(LEAD_BYTES + num_bytes + 64, 77, np.uint8)
    try:
        decode_into(memory[: LEAD_BYTES + num_bytes], data, codec, expect_hw=hw, dtype=dtype, name="x")
    finally:
        assert (memory[:LEAD_BYTES] == 77).all()
        assert (memory[-64:] == 77).all()
    return memory[LEAD_BYTES:-64].view(dtype).reshape(hw)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=30)
@given(image_HW=IMAGES)
def test_pixels_come_back_into_memory_that_is_there(codec: Codec, image_HW: np.ndarray) -> None:
    data = encode(image_HW, codec)
    back_HW = decode_between(data, codec, hw=image_HW.shape, dtype=image_HW.dtype)
    np.testing.assert_array_equal(back_HW, image_HW)


def test_zstandard_writes_to_that_memory_and_not_to_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of the published size, as packed; the way with a copy behind it is not taken."""
    image_HW = np.random.default_rng(0).integers(0, 255, (1520, 912), np.uint8)
    monkeypatch.setattr("shards.codecs.decode", None)
    np.testing.assert_array_equal(
        decode_between(encode(image_HW, "zstd"), "zstd", hw=(1520, 912), dtype=np.uint8), image_HW
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[: len(d) // 2],
        lambda d: b"",
        lambda d: b"text" * 20,
        lambda d: d[:40] + bytes(b ^ 255 for b in d[40:]),
    ],
)
def test_broken_bytes_touch_nothing_beside_that_memory(codec: Codec, damage: object) -> None:
    data = damage(encode(np.random.default_rng(0).integers(0, 255, (30, 20), np.uint8), codec))
    with pytest.raises(UserError, match="the image of x cannot be decoded"):
        decode_between(data, codec, hw=(30, 20), dtype=np.uint8)


@pytest.mark.parametrize("codec", CODECS)
def test_another_size_is_refused_there_too(codec: Codec) -> None:
    """A turned image has as many bytes, a longer one would not fit."""
    data = encode(np.zeros((30, 20), np.uint8), codec)
    for hw, dtype in (((20, 30), np.uint8), ((29, 20), np.uint8), ((31, 20), np.uint8), ((15, 20), np.uint16)):
        with pytest.raises(UserError, match="is 30 x 20 uint8"):
            decode_between(data, codec, hw=hw, dtype=dtype)


@pytest.mark.parametrize("codec", CODECS)
def test_a_view_with_other_strides_is_stored_as_it_looks(codec: Codec) -> None:
    image_HW = np.arange(48, dtype=np.uint16).reshape(6, 8)[:, ::-2].T
    data = encode(image_HW, codec)
    np.testing.assert_array_equal(decode(data, codec, expect_hw=(4, 6), dtype=np.uint16, name="x"), image_HW)


def test_zstd_payload_is_a_numpy_file_behind_zstandard() -> None:
    image_HW = np.arange(12, dtype=np.uint16).reshape(3, 4)
    raw = zstandard.ZstdDecompressor().decompress(encode(image_HW, "zstd"))
    np.testing.assert_array_equal(np.load(io.BytesIO(raw)), image_HW)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"text" * 20])
def test_broken_bytes_are_an_error_that_names_the_image(codec: Codec, damage: object) -> None:
    data = damage(encode(np.random.default_rng(0).integers(0, 255, (30, 20), np.uint8), codec))
    with pytest.raises(UserError, match="the image of sample abc cannot be decoded"):
        decode(data, codec, expect_hw=(30, 20), dtype=np.uint8, name="sample abc")


@pytest.mark.parametrize("codec", CODECS)
def test_another_size_or_type_is_an_error_with_both(codec: Codec) -> None:
    data = encode(np.zeros((30, 20), np.uint8), codec)
    with pytest.raises(UserError, match=r"is 30 x 20 uint8 .* instead of 20 x 30 uint8"):
        decode(data, codec, expect_hw=(20, 30), dtype=np.uint8, name="x")
    with pytest.raises(UserError, match=r"is 30 x 20 uint8 .* instead of 30 x 20 uint16"):
        decode(data, codec, expect_hw=(30, 20), dtype=np.uint16, name="x")


def test_a_colour_png_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(file, format="PNG")
    with pytest.raises(UserError, match="not grey: mode RGB"):
        decode(file.getvalue(), "png", expect_hw=(4, 5), dtype=np.uint8, name="x")


def test_an_array_that_is_no_image_is_refused_and_pickles_are_not_read() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be decoded"):
        decode(zstandard.ZstdCompressor().compress(file.getvalue()), "zstd", expect_hw=(1, 1), dtype="u1", name="x")
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="holds float64"):
        decode(zstandard.ZstdCompressor().compress(file.getvalue()), "zstd", expect_hw=(1, 1), dtype="u1", name="x")
