"""About the whole: whose packages are tested, and what must not stand in a committed file."""

import re
import subprocess
from pathlib import Path

import pytest

import service
import training
from service.cells.formats import FORMATS
from service.inference import TASKS
from service.inference.questions import QUESTIONS
from training.families import FAMILIES

ROOT = Path(__file__).parent.parent
# One letter of each word in brackets, so that this file does not hold what it looks for. ROOT is this machine's own path.
WRONG = re.compile(
    rb"py[p]i\.org|python[h]osted|index[-_]ur[l]|--find-link[s][ =]/|/opt/[w]heels|/hom[e]/[a-z]+/|/roo[t]/|"
    + re.escape(f"{ROOT}/".encode())
)


def committed() -> list[Path]:
    """Files that git tracks, or would."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_these_packages_are_tested() -> None:
    """`service` and `training` are common names; those of this checkout are the ones imported."""
    assert Path(service.__file__).is_relative_to(ROOT)
    assert Path(training.__file__).is_relative_to(ROOT)


def test_no_index_and_no_machine() -> None:
    """No committed file names a package index, or a path of somebody's machine."""
    found = {str(path.relative_to(ROOT)) for path in committed() if WRONG.search(path.read_bytes())}

    assert found == set()


@pytest.mark.parametrize(
    "planted",
    [
        ("--extra-index-", "url=https://wheels.example/simple"),
        ("https://py", "pi.org/simple"),
        ("https://files.python", "hosted.org/packages/a.whl"),
        ("--find-", "links /a/folder"),
        ("/opt/", "wheels"),
        (str(ROOT), "/service"),
        ("/ho", "me/somebody/cells.h5ad"),
        ("/ro", "ot/.cache"),
    ],
    ids="".join,
)
def test_the_probe_would_notice(planted: tuple[str, str]) -> None:
    """Each kind of what must not be committed is found in the middle of a file."""
    assert WRONG.search(f"first line\nbefore {''.join(planted)} after\n".encode())


def test_the_probe_looks_at_this_repository() -> None:
    """The files that are searched are those of the project, and many."""
    names = {str(path.relative_to(ROOT)) for path in committed()}
    assert {"pyproject.toml", "service/errors.py", "tests/test_names.py"} <= names


def test_tables_and_docs() -> None:
    """Every task, question, format and family has its place in the documentation."""
    api, train = ((ROOT / "docs" / name).read_text() for name in ("api.md", "train.md"))
    for task in TASKS:
        assert f"### POST /v1/{task}\n" in api
    for question in QUESTIONS:
        assert f"| `POST /v1/{question}` |" in api
    for media_type in FORMATS:
        assert f"`{media_type}`" in api
    for family in FAMILIES:
        assert f"| `{family}` |" in train


def test_links_lead_somewhere() -> None:
    """Relative links of README and docs name files that are there."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_shipped_models_are_small() -> None:
    """models_store/ holds data only, at most 15 MB per version."""
    for manifest in (ROOT / "models_store").glob("*/*/manifest.json"):
        files = list(manifest.parent.rglob("*"))
        assert sum(file.stat().st_size for file in files) < 15e6
        assert not any(file.suffix == ".py" for file in files)
