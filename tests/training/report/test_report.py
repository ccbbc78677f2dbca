"""The report: a page that needs nothing but itself, whose figures are those that others compute."""

import base64
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image as matplotlib_image
from sklearn.metrics import accuracy_score, adjusted_rand_score
from typer.testing import CliRunner

from tests.training.tiny import SETTINGS, tiny_config
from training import cli, run
from training.report import report as reporting
from training.report.report import Report

FETCHING = ("src", "href", "srcset", "data", "action", "poster", "formaction", "background", "xlink:href")
N_CELLS = 60


class Page(HTMLParser):
    """What a browser would fetch, and the tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.sources: list[str] = []
        self.alternatives: list[str] = []
        self.policy = ""
        self.cells: list[str] = []
        self.notes: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in FETCHING]
        if tag == "img":
            self.sources.append(given["src"] or "")
            self.alternatives.append(given["alt"] or "")
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self._inside = "note" if given.get("class") == "note" else tag
        if tag == "td":
            self.cells.append("")
        if self._inside == "note":
            self.notes.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "td":
            self.cells[-1] += data
        elif self._inside == "note":
            self.notes[-1] += data

    def value(self, name: str) -> str:
        """The cell to the right of `name`."""
        return self.cells[self.cells.index(name) + 1]


def made(directory: Path, **changes: Any) -> tuple[run.Run, Report, Page]:
    """A tiny run with its report."""
    fitted = run.fit(tiny_config(**changes), directory, show_progress=False)
    report = reporting.make(fitted, directory, N_CELLS)
    return fitted, report, Page(report.html)


def check_stands_alone(report: Report, page: Page) -> None:
    """No script and no address; each image decodes and says what it shows."""
    assert page.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(reference.startswith(("#", "data:image/")) for reference in page.references)
    assert "url(" not in report.html
    assert "@import" not in report.html
    assert len(page.sources) == len(report.images) > 0
    assert all(page.alternatives)
    for source in page.sources:
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,([A-Za-z0-9+/=]+)", source).groups()
        content = base64.b64decode(data, validate=True)
        if kind == "png":
            pixels = matplotlib_image.imread(io.BytesIO(content))
            assert pixels.std() > 0
        else:
            root = ET.fromstring(content)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            # An image inside an image would be fetched too; matplotlib's are parts of the same file.
            links = [
                value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")
            ]
            assert all(link.startswith(("#", "data:")) for link in links)


def test_every_family_has_a_report(family_run: tuple[run.Run, Path]) -> None:
    """The page of each family stands alone and has plots by type and by batch, curves of all parts and the run's command and seed."""
    fitted, directory = family_run
    report = reporting.make(fitted, directory, N_CELLS)
    page = Page(report.html)
    check_stands_alone(report, page)
    names = {image.name for image in report.images}
    assert {"curves", "latent_by_level_cell_type", "latent_by_batch", "reconstruction"} <= names
    assert {"confusion_cell_type", "reliability_cell_type"} <= names or "classify" not in fitted.family.graphs()
    header = (directory / "metrics.csv").read_text().splitlines()[0].split(",")
    for part in {name.removeprefix("validation_") for name in header if name.startswith("validation_")}:
        assert part in page.cells
    assert fitted.provenance["command"] in report.html
    assert page.value("split, weights, order of cells, noise") == str(fitted.config.seed)


def test_a_run_that_met_all_its_cells_has_a_report(whole_run: tuple[run.Run, Path]) -> None:
    """Training losses alone, no epoch that is best, and a word that the figures are of cells that it knows."""
    report = reporting.make(*whole_run, N_CELLS)
    page = Page(report.html)
    check_stands_alone(report, page)
    assert page.value("epoch that was kept") == "the last, 3"
    assert page.value("loss")[0].isdigit()
    assert "validation loss of that epoch" not in page.cells
    assert any("training cells (the split has no others, so figures are too good)" in note for note in page.notes)
    assert any("there are no validation cells" in text for text in page.alternatives)


def test_figures_are_those_of_the_network_and_of_sklearn(tiny_sets: None, tmp_path: Path) -> None:
    """Accuracy, calibration, reconstruction and clusters agree with what is computed here from the exported modules."""
    fitted, report, page = made(tmp_path, fit={**SETTINGS["fit"], "max_epochs": 20})
    cells = fitted.test_cells
    assert cells.n_obs <= N_CELLS
    counts = torch.from_numpy(cells.X.toarray())
    graphs = fitted.family.graphs()
    with torch.no_grad():
        latent = graphs["encode"].module(counts)
        probabilities = graphs["classify"].module(latent)[0].double().numpy()
        batch = torch.from_numpy(cells.obs["dataset"].map({"tiny_a": 0, "tiny_b": 1}).to_numpy(np.int64))
        expected = graphs["decode"].module(latent, counts.sum(dim=1), batch).double().numpy()
    classes = list(fitted.config.labels[0].classes)
    truth = np.array([classes.index(name) for name in cells.obs["cell_type"]])
    found, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    accuracy = accuracy_score(truth, found)
    (one,) = report.annotations
    assert one.accuracy == pytest.approx(accuracy)
    assert accuracy > 0.5
    assert np.trace(one.confusion) / one.confusion.sum() == pytest.approx(accuracy)
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            error += abs(confidence[inside].mean() - (found == truth)[inside].mean()) * inside.mean()
    assert one.expected_calibration_error == pytest.approx(error, abs=1e-6)
    assert page.value("accuracy") == f"{accuracy:.4g}"
    assert page.value("expected calibration error") == f"{error:.4g}"
    r = np.corrcoef(np.log1p(counts.double().numpy().mean(axis=0)), np.log1p(expected.mean(axis=0)))[0, 1]
    assert page.value("r of ln(1 + mean counts) over genes") == f"{r:.4g}"
    own = next(row for row in report.agreements if row.method == "the model's classes of cell_type")
    assert own.ari == pytest.approx(adjusted_rand_score(truth, found))
    assert any(row.method == "k-means on the latent" for row in report.agreements)


def test_the_same_run_gives_the_same_page(tiny_sets: None, tmp_path: Path) -> None:
    """Two reports of one run, the second from its directory with other threads, are the same bytes."""
    _, first, _ = made(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = reporting.make(run.load(tmp_path), tmp_path, N_CELLS)
    finally:
        torch.set_num_threads(before)
    assert first.images == second.images
    assert first.html == second.html


def test_absent_parts_are_said(tiny_sets: None, tmp_path: Path) -> None:
    """Without labels, with one batch and without metrics.csv the page says what is missing and shows the rest."""
    fitted = run.fit(tiny_config(labels=[], data=["tiny_a"], family="autoencoder"), tmp_path, show_progress=False)
    (tmp_path / "metrics.csv").unlink()
    report = reporting.make(fitted, tmp_path, N_CELLS)
    page = Page(report.html)
    check_stands_alone(report, page)
    assert {image.name for image in report.images} == {"latent_by_batch", "reconstruction"}
    said = " ".join(page.notes)
    for sentence in (
        "metrics.csv of this run is missing",
        "names no labels, so there is no plot by type",
        "nothing to annotate",
    ):
        assert sentence in said
    assert "There is no agreement of clusters with labels" in said
    assert f"{N_CELLS} of 120 cells" in said


def test_values_that_are_not_numbers_are_said(tiny_sets: None, tmp_path: Path) -> None:
    """NaN in metrics.csv is counted and left out; a latent without directions is not projected."""
    fitted, _, _ = made(tmp_path, family="autoencoder")
    log = tmp_path / "metrics.csv"
    lines = log.read_text().splitlines()
    row = lines[1].split(",")
    row[lines[0].split(",").index("validation_loss")] = "nan"
    log.write_text("\n".join([lines[0], ",".join(row), *lines[2:]]) + "\n")
    with torch.no_grad():
        fitted.family.to_latent[0].weight.zero_()
    report = reporting.make(fitted, tmp_path, N_CELLS)
    said = " ".join(Page(report.html).notes)
    assert "1 values in metrics.csv are not numbers" in said
    assert "0 directions in which cells differ" in said
    assert not any(image.name.startswith("latent") for image in report.images)


def test_text_of_users_is_escaped(tiny_sets: None, tmp_path: Path) -> None:
    """Markup in a summary or a class is shown and not run, and no name breaks a plot."""
    classes = {"B": None, "NK": None, "CD4 T": None, "<script>alert(1)</script>": None, "_hidden $x$ 細胞": None}
    labels = [{"name": "cell_type", "classes": classes}]
    summary = '"><img src=https://example.com/x.png onerror=alert(1)>'
    _, report, page = made(tmp_path, labels=labels, summary=summary)
    check_stands_alone(report, page)
    assert "<script" not in report.html
    assert "&lt;img src=https://example.com" in report.html


def test_cells_of_an_unknown_batch_are_reconstructed(tiny_sets: None, tmp_path: Path) -> None:
    """A held-out batch is decoded as the average one: the mean over batches for a family without a code for it."""
    split = {"method": "held_out", "held_out": ["tiny_b"]}
    fitted, report, _ = made(tmp_path, split=split)
    assert (report.reconstruction.observed_cell > 0).all()
    assert np.isfinite(report.reconstruction.predicted_cell).all()
    assert "tiny_b" not in fitted.prepared.batches


def test_commands_write_the_page_and_the_plots(tiny_sets: None, tmp_path: Path) -> None:
    """`fit --report` writes both into the run; `report` writes the same page again, and plots where it is told."""
    config, output = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(json.dumps(SETTINGS))
    runner = CliRunner()
    result = runner.invoke(cli.app, ["fit", str(config), "--output", str(output), "--report"])
    assert result.exit_code == 0, result.output
    page = (output / reporting.REPORT).read_bytes()
    plots = {path.name: path.read_bytes() for path in (output / reporting.PLOTS).iterdir()}
    assert {"curves.svg", "latent_by_batch.png", "reconstruction.png"} <= set(plots)
    (output / reporting.REPORT).unlink()
    shutil.rmtree(output / reporting.PLOTS)
    again = runner.invoke(cli.app, ["report", str(output), "--plots", str(tmp_path / "plots")])
    assert again.exit_code == 0, again.output
    assert (output / reporting.REPORT).read_bytes() == page
    assert {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()} == plots
