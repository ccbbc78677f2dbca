"""card.html of an artifact: the model card as one page with its plots inside."""

from collections.abc import Mapping

from markdown_it import MarkdownIt

from training.held_out import HeldOut
from training.report import plots
from training.report.page import Section, image, page


def write(card: str, held_out: HeldOut | None) -> str:
    """The page of a card in Markdown, whose sections begin with `## `; what a user wrote in it is text and never HTML."""
    title, *sections = card.split("\n## ")
    pictures = _pictures(held_out)
    found = []
    for section in sections:
        heading, _, body = section.partition("\n")
        html = _html(body)
        found.append(Section(heading, (f'<div class="wide">{html}</div>\n', *pictures.get(heading, ()))))
    heading, _, summary = title.removeprefix("# ").partition("\n")
    sentence, _, facts = summary.strip().partition("\n")
    return page(heading, sentence, [Section("Model", (_html(facts),)), *found])


def _html(text: str) -> str:
    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))


def _pictures(held_out: HeldOut | None) -> Mapping[str, tuple[str, ...]]:
    """Plots by the heading that they stand below."""
    if held_out is None:
        return {}
    made = {}
    for level, found in held_out.annotations.items():
        drawn = (plots.confusion(found, f"confusion_{level}"), plots.reliability(found, f"reliability_{level}"))
        made[f"Held-out cells: {level}"] = tuple(image(picture, picture.text) for picture in drawn)
    return made
