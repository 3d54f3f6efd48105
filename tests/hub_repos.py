"""Repositories of the Hub of the tests: commits on branches, each a whole tree of files."""

import hashlib
from dataclasses import dataclass, field
from typing import Any


LFS_BYTES = 30_000
"""Larger files, and weights of any size, go beside the commit."""


@dataclass(frozen=True)
class Commit:
    """The tree of files after a commit; `oid` is made of all that is in it."""

    title: str
    files: dict[str, bytes]
    parent: str = ""

    @property
    def oid(self) -> str:
        content = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(self.files.items())]
        return hashlib.sha1(repr((self.title, self.parent, content)).encode()).hexdigest()


@dataclass
class Repo:
    """Branches and pull requests by name, each a list of commits of which the last counts."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commits(self, revision: str = "main") -> list[Commit]:
        """The commits up to a branch's head, or up to a commit by its id; none if there is no such revision."""
        if revision in self.branches:
            return self.branches[revision]
        for commits in self.branches.values():
            for index, commit in enumerate(commits):
                if commit.oid == revision:
                    return commits[: index + 1]
        return []

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits(revision)[-1].files


def is_large(name: str, size: int) -> bool:
    return name.endswith(".safetensors") or size > LFS_BYTES


def blob_oid(data: bytes) -> str:
    """The id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def described(name: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    row: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob_oid(data)}
    if is_large(name, len(data)):
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return row
