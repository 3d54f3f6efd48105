"""Text that people name: what is not UTF-8 is refused with its first wrong byte."""

import pytest

from hf_compressm.utils.text import decoded


@pytest.mark.parametrize(
    ("content", "place", "kind"),
    [
        (b"caf\xe9 au lait", 3, ""),
        (b"ends in the middle of \xc3", 22, ""),
        (b"\x89PNG\r\n\x1a\n", 0, ""),
        (b"a\0b", 1, ""),
        (b"\xef\xbb\xbfa\0", 4, ""),
        (b"\xef\xbb\xbfa\xff", 4, ""),
        ("words".encode("utf-16-le"), 1, ""),
        ("words".encode("utf-16"), 0, "it looks like UTF-16"),
        (b"PK\x03\x04\x14\x00", 5, "it looks like a zip archive"),
        (b"\x1f\x8b\x08\x00", 1, "it looks like gzip"),
        (b"\0", 0, ""),
    ],
)
def test_the_first_byte_that_is_not_text_is_named(content: bytes, place: int, kind: str) -> None:
    with pytest.raises(ValueError, match=r"^some\.bin is not text in UTF-8.*convert") as caught:
        decoded(content, "some.bin")
    assert f"byte {place} is 0x{content[place]:02x}" in str(caught.value)
    assert kind in str(caught.value)


def test_text_comes_as_python_opens_it() -> None:
    assert decoded("\ufeffé\r\nß\rx\n".encode(), "a.txt") == "é\nß\nx\n"
    assert decoded(b"", "a.txt") == ""
