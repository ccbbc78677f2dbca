"""Wire formats by media type. To add one: write its file and name it here."""

from service.cells.formats import arrow, csv, h5ad, json
from service.cells.formats.format import Format

FORMATS: dict[str, Format] = {module.FORMAT.media_type: module.FORMAT for module in (json, arrow, h5ad, csv)}
BODIES: dict[str, Format] = {media_type: form for media_type, form in FORMATS.items() if form.is_body}
"""Those in which cells can be sent."""

IN_MEMORY: dict[str, Format] = {media_type: form for media_type, form in FORMATS.items() if form.read is not None}
"""Those whose bodies are no files: in which questions about all cells together can be asked."""
