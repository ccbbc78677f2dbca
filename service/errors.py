"""Everything that can go wrong, one class each, with a stable code and the fields that fill its sentence.

Raised where the fact is known; turned into an HTTP status in `service/api/problems.py` and into an exit code in `service/cli.py`.
Clients branch on `code`, so a code never changes its meaning.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(eq=False)
class CellserveError(Exception):
    """Base of all errors that a user can meet.

    A subclass declares `code`, `title` and `sentence`; its dataclass fields fill the sentence and travel in the problem document.
    """

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    sentence: ClassVar[str] = "Something went wrong on the server. It has been logged with the request id."

    @property
    def detail(self) -> str:
        """The sentence with its fields filled in: what was found, where, and what to do."""
        return self.sentence.format(**self.members())

    def members(self) -> dict[str, Any]:
        """The fields by name, as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return self.detail


# --- the body -------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class MalformedBody(CellserveError):
    """The bytes are not of the format that Content-Type names."""

    code = "malformed_body"
    title = "The body cannot be read"
    sentence = "{problem}"
    problem: str


@dataclass(eq=False)
class InvalidCells(CellserveError):
    """The format is right, but what it holds is not cells as documented."""

    code = "invalid_cells"
    title = "The cells are not in the documented form"
    sentence = "{problem}"
    problem: str


@dataclass(eq=False)
class EmptyBody(CellserveError):
    """Nothing was sent."""

    code = "empty_body"
    title = "Empty body"
    sentence = "The body is empty: no cells. docs/api.md shows the bodies that are accepted."


@dataclass(eq=False)
class NoCells(CellserveError):
    """The body holds no cell."""

    code = "no_cells"
    title = "No cells"
    sentence = "The request holds no cells. Send at least one; docs/api.md shows the bodies that are accepted."


@dataclass(eq=False)
class BodyTooLarge(CellserveError):
    """More bytes than the server reads."""

    code = "body_too_large"
    title = "The body is too large"
    sentence = (
        "The body is larger than the {limit_bytes:,} bytes that this server reads. Send fewer cells per request, or send Arrow with "
        "zstd compression instead of JSON; the Python client splits a data set by itself."
    )
    limit_bytes: int


@dataclass(eq=False)
class TooManyCells(CellserveError):
    """More cells than one request may hold."""

    code = "too_many_cells"
    title = "Too many cells in one request"
    sentence = "The request holds {n_cells:,} cells, this server takes {limit_cells:,} at a time. Split it; answers do not depend on it."
    n_cells: int
    limit_cells: int


@dataclass(eq=False)
class UnsupportedMediaType(CellserveError):
    """Content-Type or Content-Encoding is not one that is read."""

    code = "unsupported_media_type"
    title = "Unsupported media type"
    sentence = "{header} '{found}' is not read here. Send one of: {accepted}."
    header: str
    found: str
    accepted: str


@dataclass(eq=False)
class NotAcceptable(CellserveError):
    """Accept names nothing that can be written."""

    code = "not_acceptable"
    title = "Not acceptable"
    sentence = "None of the types in Accept '{found}' can be given. Ask for one of: {offered}."
    found: str
    offered: str


@dataclass(eq=False)
class InvalidOption(CellserveError):
    """A query parameter is unknown or has a value that is not allowed."""

    code = "invalid_option"
    title = "Invalid option"
    sentence = "Option '{name}': {problem}"
    name: str
    problem: str


# --- files that are uploaded ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class FileRefused(CellserveError):
    """An uploaded file holds what is not read here: a link out of it, data in other files, an unknown filter or type."""

    code = "file_refused"
    title = "The file holds what is not read here"
    sentence = "'{path}' in the file is {found}, which is not read here. {advice}"
    path: str
    found: str
    advice: str


@dataclass(eq=False)
class FileTooLarge(CellserveError):
    """What an uploaded file declares is more than this server decompresses."""

    code = "file_too_large"
    title = "The file holds too much"
    sentence = (
        "'{path}' in the file declares {n_bytes:,} bytes once decompressed, this server reads {limit_bytes:,}. Store counts as a sparse matrix "
        "(scipy.sparse.csr_matrix), or send fewer cells per file; answers do not depend on it."
    )
    path: str
    n_bytes: int
    limit_bytes: int


@dataclass(eq=False)
class NoRawCounts(CellserveError):
    """No place of an uploaded file where raw counts are looked for holds any."""

    code = "no_raw_counts"
    title = "The file holds no raw counts"
    sentence = (
        "No raw counts were found in the file. {found}. Its layers are: {layers}. Name the place of the raw counts with ?layer=NAME (a layer, "
        "or X) or ?use_raw=true (raw/X), or put them into layers['counts']."
    )
    found: str
    layers: str


@dataclass(eq=False)
class FileReaderEnded(CellserveError):
    """The process that reads uploaded files ended, or had to be ended, while it read this one; nothing else was affected."""

    code = "file_reader_ended"
    title = "Reading the file failed"
    sentence = (
        "The process that reads files ended ({reason}) while it read this one; no other request was affected. The file is probably damaged: "
        "read it with anndata and write it anew. If it is not, send it again."
    )
    reason: str


@dataclass(eq=False)
class FileNeedsTooMuch(CellserveError):
    """Reading an uploaded file takes more time or memory than one file may take."""

    code = "file_needs_too_much"
    title = "Reading the file takes too much"
    sentence = (
        "Reading the file takes more than the {limit:,} {unit} that one file may take here. Store counts as a csr matrix without large HDF5 "
        "chunks, or send fewer cells per file; answers do not depend on it."
    )
    limit: int
    unit: str


@dataclass(eq=False)
class AnswerNotWritten(CellserveError):
    """The process that writes .h5ad answers ended while it wrote this one."""

    code = "answer_not_written"
    title = "The answer could not be written"
    sentence = "The .h5ad file of the answer could not be written. {reason} The same answer can be had as Arrow, CSV or JSON (Accept)."
    reason: str


@dataclass(eq=False)
class NoDiskSpace(CellserveError):
    """The disk of the server has no room for an upload."""

    code = "no_disk_space"
    title = "No space on disk"
    sentence = "The server's disk has no room for this upload or its answer. Try again later, or send smaller files."


# --- genes and counts -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class TooFewGenes(CellserveError):
    """The query and the model share fewer genes than the manifest's floor."""

    code = "too_few_genes"
    title = "Too few of the model's genes are present"
    sentence = (
        "Of the {n_model_genes:,} genes of {model}, {n_matched:,} are among the {n_query_genes:,} genes that were sent "
        "({gene_overlap:.1%}; at least {min_gene_overlap:.0%} is needed). Sent, for example: {query_examples}. "
        "The model knows, for example: {model_examples}. {hint}"
    )
    model: str
    n_model_genes: int
    n_query_genes: int
    n_matched: int
    gene_overlap: float
    min_gene_overlap: float
    query_examples: str
    model_examples: str
    hint: str


@dataclass(eq=False)
class SpeciesMismatch(CellserveError):
    """The names of the genes speak for another species than the model's."""

    code = "species_mismatch"
    title = "The genes are of another species"
    sentence = (
        "{model} is a model of {species}, and the genes look like those of {guess}: {evidence}. Map them to one-to-one orthologs of "
        "{species} first, and leave out genes that have none."
    )
    model: str
    species: str
    guess: str
    evidence: str


@dataclass(eq=False)
class NotRawCounts(CellserveError):
    """A value is negative, not finite, fractional, or beyond what float32 holds exactly."""

    code = "not_raw_counts"
    title = "The values are not raw counts"
    sentence = "{cell} has {n_values:,} {kind} value(s), first {value} at gene {gene}. {hint}"
    cell: str
    kind: str
    n_values: int
    value: str
    gene: str
    hint: str


# --- models and artifacts -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ModelNotFound(CellserveError):
    """No model, version or alias of that name."""

    code = "model_not_found"
    title = "Model not found"
    sentence = "There is no model '{model}' here. Available: {available}. Name one with ?model=name, name@version or name@alias."
    model: str
    available: str


@dataclass(eq=False)
class ModelNotReady(CellserveError):
    """The model exists, but is not loaded yet or could not be."""

    code = "model_not_ready"
    title = "Model not ready"
    sentence = "Model '{model}' cannot answer: {reason}"
    model: str
    reason: str


@dataclass(eq=False)
class TaskNotOffered(CellserveError):
    """The artifact lacks a graph or the reference cells that the task needs."""

    code = "task_not_offered"
    title = "The model does not offer this task"
    sentence = "Model '{model}' has not what '{task}' needs. It offers: {offered}."
    model: str
    task: str
    offered: str


@dataclass(eq=False)
class NoReference(CellserveError):
    """The artifact carries no reference cells."""

    code = "no_reference"
    title = "The model carries no reference cells"
    sentence = (
        "Model '{model}' was exported without its reference cells: there is nothing to map to or to draw (docs/map.md)."
    )
    model: str


@dataclass(eq=False)
class ImpactNotOffered(CellserveError):
    """The artifact holds no table of what its genes do."""

    code = "impact_not_offered"
    title = "The model does not say what its units are made of"
    sentence = "Model '{model}' was exported without a table of impacts. Export it again to get one."
    model: str


@dataclass(eq=False)
class UnitNotFound(CellserveError):
    """The model has no such latent unit."""

    code = "unit_not_found"
    title = "No such unit"
    sentence = "Model '{model}' has no latent unit '{unit}'. It has 0 to {last}."
    model: str
    unit: str
    last: int


@dataclass(eq=False)
class LabelNotFound(CellserveError):
    """The model has no such label."""

    code = "label_not_found"
    title = "No such label"
    sentence = "Model '{model}' has no label '{label}'. It has {known}."
    model: str
    label: str
    known: str


@dataclass(eq=False)
class InvalidArtifact(CellserveError):
    """A version directory is not a whole, unchanged artifact that this program understands."""

    code = "invalid_artifact"
    title = "Invalid artifact"
    sentence = "{path}: {problem}"
    path: str
    problem: str


@dataclass(eq=False)
class VersionExists(CellserveError):
    """A version is immutable and this one is already there."""

    code = "version_exists"
    title = "Version exists"
    sentence = "{path} exists, and a version is never changed. Export under another version."
    path: str


@dataclass(eq=False)
class ProviderUnavailable(CellserveError):
    """The execution provider that was asked for is not there."""

    code = "provider_unavailable"
    title = "Execution provider unavailable"
    sentence = (
        "Provider '{asked}' was asked for, but cannot be used: {reason}. Mend that, or set CELLSERVE_PROVIDER=cpu, "
        "or CELLSERVE_ALLOW_PROVIDER_FALLBACK=true to run on the CPU wherever it is so."
    )
    asked: str
    reason: str


@dataclass(eq=False)
class GoldenMismatch(CellserveError):
    """The golden cells give other answers on this machine than where the model was exported."""

    code = "golden_mismatch"
    title = "Golden cells give other answers here"
    sentence = (
        "{model}: '{output}' of the golden cells differs by {difference:.3g} from what was exported, more than the {tolerance:.3g} "
        "allowed. The version is not served on this machine."
    )
    model: str
    output: str
    difference: float
    tolerance: float


@dataclass(eq=False)
class UnstableBits(CellserveError):
    """A cell's answer depends on the cells that run with it, whatever the number of rows."""

    code = "unstable_bits"
    title = "A cell's bits depend on its company"
    sentence = (
        "{graph}: on this machine a golden cell gets other bits in another place of the same run. The version is not served here. "
        "Try the CPU provider (CELLSERVE_PROVIDER=cpu)."
    )
    graph: str


# --- load and life --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class QueueFull(CellserveError):
    """Admitting the request would exceed the bound on queued rows."""

    code = "queue_full"
    title = "The queue is full"
    sentence = "{n_queued:,} cells are waiting and {n_cells:,} more do not fit under {limit_rows:,}. Try again in {retry_after_seconds} s."
    n_queued: int
    n_cells: int
    limit_rows: int
    retry_after_seconds: int


@dataclass(eq=False)
class DeadlineTooShort(CellserveError):
    """At the speed of the moment the answer would come after the client's deadline; nothing was begun."""

    code = "deadline_too_short"
    title = "Cannot be done in time"
    sentence = (
        "The answer would take about {expected_seconds:.3g} s, but only {left_seconds:.3g} s are left until the deadline of X-Request-Timeout. "
        "Try again in {retry_after_seconds} s, or give it more time."
    )
    expected_seconds: float
    left_seconds: float
    retry_after_seconds: int


@dataclass(eq=False)
class DeadlinePassed(CellserveError):
    """The client's deadline passed while its cells waited; they were not run."""

    code = "deadline_passed"
    title = "The deadline has passed"
    sentence = "The deadline of X-Request-Timeout passed after {waited_seconds:.3g} s in the queue; nothing was run."
    waited_seconds: float


@dataclass(eq=False)
class ClientBudgetSpent(CellserveError):
    """The client has used the computing that it may use for now; others have not."""

    code = "client_budget_spent"
    title = "The client's budget is spent"
    sentence = (
        "This client has used {overdrawn_seconds:.3g} s of computing more than it has saved up, at {seconds_per_second:g} s per second. "
        "Try again in {retry_after_seconds} s."
    )
    overdrawn_seconds: float
    seconds_per_second: float
    retry_after_seconds: int


@dataclass(eq=False)
class RequestNotFound(CellserveError):
    """No request of this id is known, or not any more."""

    code = "request_not_found"
    title = "No such request"
    sentence = (
        "No request with this X-Request-ID is being answered. Requests are known here from when their first cells have been read until "
        "{kept_seconds:g} s after their end, if they are streamed or have more than {n_cells:,} cells."
    )
    kept_seconds: float
    n_cells: int


@dataclass(eq=False)
class TooManyBytes(CellserveError):
    """The bodies that are held leave no room for this one."""

    code = "too_many_bytes"
    title = "Too many bytes in flight"
    sentence = (
        "There is no room for {n_bytes:,} more bytes: this server holds at most {limit_bytes:,} at a time. "
        "Try again in {retry_after_seconds} s."
    )
    n_bytes: int
    limit_bytes: int
    retry_after_seconds: int


@dataclass(eq=False)
class BodyTimeout(CellserveError):
    """The body did not arrive in time."""

    code = "body_timeout"
    title = "The body did not arrive in time"
    sentence = "After {limit_seconds:g} s only {n_bytes:,} bytes of the body had arrived. Send smaller requests."
    n_bytes: int
    limit_seconds: float


@dataclass(eq=False)
class RequestTimeout(CellserveError):
    """The answer took longer than the server allows."""

    code = "timeout"
    title = "Timed out"
    sentence = "No answer within {limit_seconds:g} s; what was waiting has left the queue. Send fewer cells, or try again later."
    limit_seconds: float


@dataclass(eq=False)
class ShuttingDown(CellserveError):
    """The process drains and takes no new work."""

    code = "shutting_down"
    title = "Shutting down"
    sentence = (
        "This server is shutting down and takes no new work. Send the request again; another instance will answer."
    )


@dataclass(eq=False)
class NotReady(CellserveError):
    """The readiness probe's answer while the service cannot do its work."""

    code = "not_ready"
    title = "Not ready"
    sentence = "{reason}"
    reason: str
    models: dict[str, str]


@dataclass(eq=False)
class NotAlive(CellserveError):
    """The liveness probe's answer when the process cannot recover by itself."""

    code = "not_alive"
    title = "Not alive"
    sentence = "{reason}"
    reason: str


@dataclass(eq=False)
class NotAuthorised(CellserveError):
    """An admin call without the token that CELLSERVE_ADMIN_TOKEN holds."""

    code = "not_authorised"
    title = "Not authorised"
    sentence = (
        "This call needs the header 'Authorization: Bearer TOKEN' with the token that the server was started with."
    )


@dataclass(eq=False)
class RouteNotFound(CellserveError):
    """No such path."""

    code = "not_found"
    title = "Not found"
    sentence = "There is nothing at this path. GET /docs.json describes all paths, GET /v1/models lists the models."


@dataclass(eq=False)
class MethodNotAllowed(CellserveError):
    """The path exists, but not for this method."""

    code = "method_not_allowed"
    title = "Method not allowed"
    sentence = "{method} is not allowed here. Use {allowed}."
    method: str
    allowed: str
