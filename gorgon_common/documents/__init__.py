"""The only reader of the files that people write: workflows, inputs, prices, limits, roles.

`files` reads the text of a named file, `reader` reads YAML 1.2 strictly and records the position of every value, and
`data` reads files that are not workflows.
"""

from gorgon_common.documents.data import read_data
from gorgon_common.documents.files import STDIN, is_stream, read_text, shown_name
from gorgon_common.documents.positions import Mark, Path, Positions, format_path, parse_path
from gorgon_common.documents.reader import WORKFLOW, Document, Rules, read_document
from gorgon_common.documents.syntax import quoted

__all__ = [
    "STDIN",
    "WORKFLOW",
    "Document",
    "Mark",
    "Path",
    "Positions",
    "Rules",
    "format_path",
    "is_stream",
    "parse_path",
    "quoted",
    "read_data",
    "read_document",
    "read_text",
    "shown_name",
]
