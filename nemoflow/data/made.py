"""What a program that makes an artifact may return instead of its measures alone."""

from typing import NamedTuple


class Made(NamedTuple):
    """measures: what was counted. contents: every file made, as {"name", "size" in bytes, "sha256" or "blake3"}, for
    programs that hash while they write; what is not listed (a file that holds paths, say) is not sealed."""

    measures: dict
    contents: list[dict]
