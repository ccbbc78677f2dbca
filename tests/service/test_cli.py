"""The command line: models, verify, alias, and one command per task."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from service import cli
from service.contract.store import Store
from service.contract.traffic import Split, Traffic
from service.inference import TASKS
from service.inference.model import Model
from tests.builders import counts, gene_table, write_artifact


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run `cellserve` over a store of its own; gives exit code and everything printed."""
    write_artifact(tmp_path / "store")
    monkeypatch.setenv("CELLSERVE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["cellserve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


@pytest.fixture
def query(tmp_path: Path) -> Path:
    """An .h5ad file of five cells."""
    adata = ad.AnnData(counts(5), var=pd.DataFrame(index=list(gene_table().gene_symbol)))
    adata.write_h5ad(tmp_path / "query.h5ad")
    return tmp_path / "query.h5ad"


def test_models(run) -> None:
    """Names, versions and what they are."""
    code, output = run("models")
    assert code == 0
    assert "tiny" in output
    assert "made_for_tests" in output


def test_verify(run, tmp_path: Path) -> None:
    """A good version is said to be; a broken one is refused with the reason, and the exit code says so."""
    assert run("verify") == (0, run("verify", "tiny")[1])
    (tmp_path / "store/tiny/1/genes.tsv").write_bytes(b"x")
    code, output = run("verify")
    assert code == 1
    assert "refused tiny@1" in output
    assert "genes.tsv" in output
    assert run("verify", "nope")[0] == 1


def test_alias(run) -> None:
    """An alias is set to a version that is there."""
    assert run("alias", "tiny@1", "canary") == (0, "tiny@canary is tiny@1 now\n")
    assert run("alias", "tiny@9")[0] == 1
    assert "cannot be an alias" in run("alias", "tiny@1", "1")[1]


def test_traffic(run, tmp_path: Path) -> None:
    """A split and a shadow are written, and ended by a call without options; what is not there is refused."""
    store = Store(tmp_path / "store")
    assert run("traffic", "tiny", "--to", "1", "--share", "0.25", "--shadow", "1") == (
        0,
        "tiny: 25.0% to tiny@1, with tiny@1 as shadow\n",
    )
    assert store.traffic("tiny") == Traffic(split=Split(to="1", share=0.25), shadow="1")
    assert run("traffic", "tiny", "--to", "9")[0] == 1
    assert run("traffic", "tiny", "--to", "1", "--share", "1.5")[0] != 0
    assert store.traffic("tiny").shadow == "1"
    assert run("traffic", "tiny") == (0, "tiny: all to the default version\n")
    assert store.traffic("tiny") == Traffic()


@pytest.mark.parametrize("task", TASKS)
def test_tasks(run, query: Path, tmp_path: Path, tiny: Model, task: str) -> None:
    """Each task reads an .h5ad and writes one with its columns, from the same code that serves."""
    code, output = run(task, query, tmp_path / "out.h5ad", "--model", "tiny")
    answer = ad.read_h5ad(tmp_path / "out.h5ad")

    assert (code, "5 cells answered by tiny@1" in output) == (0, True)
    assert task in answer.uns["cellserve"]
    if task == "embed":
        np.testing.assert_array_equal(answer.obsm["X_tiny"], tiny.encode(counts(5)))


def test_options(run, query: Path, tmp_path: Path) -> None:
    """Options are those of the API; a wrong one is named."""
    assert run("reconstruct", query, tmp_path / "out.h5ad", "--option", "genes=G1,G2")[0] == 0
    assert list(ad.read_h5ad(tmp_path / "out.h5ad").obsm["expression"].columns) == ["G1", "G2"]
    assert "NOPE" in run("reconstruct", query, tmp_path / "out.h5ad", "--option", "genes=NOPE")[1]
    assert "nonsense" in run("reconstruct", query, tmp_path / "out.h5ad", "--option", "nonsense=1")[1]
    assert "name=value" in run("reconstruct", query, tmp_path / "out.h5ad", "--option", "nonsense")[1]


def test_what_a_user_can_mend(run, query: Path, tmp_path: Path) -> None:
    """Wrong counts, files and layers are one sentence without a trace."""
    adata = ad.read_h5ad(query)
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "half.h5ad")
    for arguments in (
        ("embed", tmp_path / "half.h5ad", "o"),
        ("embed", query, "o", "--layer", "nope"),
        ("embed", tmp_path / "no.h5ad", "o"),
    ):
        code, output = run(*arguments)
        assert code != 0
        assert "Traceback" not in output
        assert output.strip()


def test_questions(run, query: Path, tmp_path: Path) -> None:
    """Check and markers print the answer as JSON, by clusters where a column is named; what is wrong is one sentence."""
    adata = ad.AnnData(counts(60), var=pd.DataFrame(index=list(gene_table().gene_symbol)))
    adata.obs["leiden"] = [str(number % 2) for number in range(60)]
    adata.write_h5ad(tmp_path / "many.h5ad")
    code, output = run("check", tmp_path / "many.h5ad", "--cluster-key", "leiden")
    found = json.loads(output)
    assert (code, found["n_cells"], set(found["majority_labels"])) == (0, 60, {"0", "1"})
    assert (found["counts_source"], found["depends_on"]) == ("X", "all cells of the request")

    arguments = ("--cluster-key", "leiden", "--option", "group_by=clusters", "--option", "n_genes=3")
    code, output = run("markers", tmp_path / "many.h5ad", *arguments)
    assert (code, [len(group["genes"]) for group in json.loads(output)["groups"].values()]) == (0, [3, 3])
    assert "group_by" in run("markers", query, "--option", "group_by=clusters")[1]
    assert "leiden" in run("check", query, "--cluster-key", "leiden")[1]
    assert run("markers", query, "--option", "test=nope")[0] == 1


def test_a_refused_query_is_red(run, query: Path, tmp_path: Path) -> None:
    """Check gives a verdict where a task gives an error."""
    adata = ad.read_h5ad(query)
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "logged.h5ad")
    code, output = run("check", tmp_path / "logged.h5ad")
    assert (code, json.loads(output)["refused"]["code"]) == (0, "not_raw_counts")
    assert run("markers", tmp_path / "logged.h5ad")[0] == 1


def test_genes_check(run, query: Path, tmp_path: Path) -> None:
    """Names come from a text file or from an .h5ad, and both say the same."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(gene_table().gene_symbol) + "\n\n")
    code, output = run("genes-check", names)
    assert (code, json.loads(output)["n_matched"]) == (0, 40)
    assert json.loads(run("genes-check", query)[1]) == json.loads(output)
    names.write_text("Cd3d\nMs4a1\n")
    assert json.loads(run("genes-check", names)[1])["problem"]["code"] == "species_mismatch"
