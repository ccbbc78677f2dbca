"""Wire formats by media type. To add one: write its file and name it here."""

from service.cells.formats import arrow, json
from service.cells.formats.format import Format

FORMATS: dict[str, Format] = {module.FORMAT.media_type: module.FORMAT for module in (json, arrow)}
