"""What is wrong with a file of cells."""

from pathlib import Path


class UnknownFormat(Exception):
    """A file is of no format that we know, or is said to be of one that does not exist."""


class BadFile(Exception):
    """A file is not what it should be: says which file, what was expected, and what was found."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}; found {found}")
        self.path, self.expected, self.found = path, expected, found
