"""Text from files that a person names: UTF-8, or an error that says where it is not and what to do."""

from pathlib import Path


_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip"}
"""First bytes of what is most often mistaken for text."""


def decoded(content: bytes, path: str | Path) -> str:
    """The text of a file in UTF-8, without a byte order mark and with line feeds at the ends of lines.

    Args:
        content: of the file.
        path: of the file, for the error.

    Raises:
        ValueError: naming the file, its first byte that is not UTF-8 text, and the way out.
    """
    kind = next((f" (it looks like {name})" for mark, name in _MARKS.items() if content.startswith(mark)), "")
    try:
        text, place = content.decode("utf-8"), len(content)
    except UnicodeDecodeError as error:
        text, place = "", error.start
    if 0 <= (zero := content.find(0)) < place:  # which UTF-8 allows, and text does not have
        place = zero
    if place < len(content):
        raise ValueError(
            f"{path} is not text in UTF-8: byte {place} is 0x{content[place]:02x}{kind}. Give a text file, or convert "
            "this one to UTF-8, with an editor or `iconv -f ENCODING -t UTF-8`."
        )
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
