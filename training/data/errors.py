"""What a user can meet and mend in his data; each is raised where its fact is known."""

from training.data.cell_filters import NoCells
from training.data.features import NoGenes
from training.data.formats.errors import BadFile, UnknownFormat
from training.data.gene_map import CountsOnDisk
from training.data.prepared import LabelsContradict, NoTrainingCells, UnknownColumn
from training.data.splits import UnknownBatch

USER_ERRORS = (
    BadFile,
    CountsOnDisk,
    LabelsContradict,
    NoCells,
    NoGenes,
    NoTrainingCells,
    UnknownBatch,
    UnknownColumn,
    UnknownFormat,
)
