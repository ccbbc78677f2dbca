"""Settings of the service: environment variables CELLSERVE_*. Read in app.py and cli.py only; below, plain arguments."""

import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import DirectoryPath, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "CELLSERVE_"
# Variables of the same prefix that other programs of this project read.
OTHERS = frozenset({"CELLSERVE_DATA", "CELLSERVE_URL", "CELLSERVE_TEST_SERVER_PYTHON", "CELLSERVE_BENCH_PYTHON"})


class SettingsError(Exception):
    """A CELLSERVE_* variable is unknown, or its value is not allowed."""


class Settings(BaseSettings):
    """One field per variable; the unit, the default and the consequence stand in its description."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    store: Path = Field(Path("models_store"), description="Directory of models; see docs/artifact.md.")
    provider: Literal["cpu", "cuda"] = Field("cpu", description="ONNX Runtime execution provider that graphs run on.")
    allow_provider_fallback: bool = Field(
        False, description="Run on the CPU where the provider is not there. Otherwise the service does not start."
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Pieces of 64 cells that run side by side. By default the CPUs that the process may use (affinity, control group).",
    )
    batch_rows: int = Field(
        1024,
        ge=1,
        le=4096,
        description="Cells that run together at most: always 256, and more while they take no longer than 10 ms. Larger requests are split.",
    )
    max_queue_rows: int = Field(
        262_144, ge=1, description="Cells held in the queue. Beyond it requests get 429 with Retry-After."
    )
    max_cells: int = Field(131_072, ge=1, description="Cells in one request. Beyond it a request gets 413.")
    max_body_bytes: int = Field(
        256 * 2**20, ge=1024, description="Bytes of one body. Beyond it a request gets 413, before it is read whole."
    )
    max_decoded_bytes: int = Field(
        2**30, ge=1024, description="Bytes that a compressed Arrow body may decompress to. Beyond it: 413."
    )
    max_body_bytes_in_flight: int = Field(
        2**30,
        ge=1024,
        description="Bytes of all bodies that are held at a time. Beyond it requests get 429 with Retry-After.",
    )
    body_timeout_seconds: float = Field(
        60, gt=0, description="Seconds within which a body must have arrived. Beyond it: 408."
    )
    max_upload_bytes: int = Field(
        2 * 2**30,
        ge=1024,
        description="Bytes of one .h5ad body, and of one matrix in it once decompressed. They lie on disk. Beyond it: 413.",
    )
    max_upload_bytes_in_flight: int = Field(
        8 * 2**30,
        ge=1024,
        description="Bytes on disk of all .h5ad bodies, their counts and .h5ad answers at a time. Beyond it requests get 429 with Retry-After.",
    )
    upload_timeout_seconds: float = Field(
        600,
        gt=0,
        allow_inf_nan=False,
        description="Seconds within which an .h5ad body must have arrived. Beyond it: 408.",
    )
    upload_directory: DirectoryPath | None = Field(
        None,
        description="Directory of these files, which have no names there. By default the system's for temporary files; where that is in memory "
        "(tmpfs), so are they.",
    )
    parse_seconds: float = Field(
        120,
        gt=0,
        allow_inf_nan=False,
        description="Seconds, of a processor and of the clock, that reading an .h5ad file may take. Beyond it: 413.",
    )
    parse_memory_bytes: int = Field(
        2**30,
        ge=2**28,
        description="Address space of a process that reads .h5ad files, of which there are at most two. Beyond it: 413.",
    )
    timeout_seconds: float = Field(
        60, gt=0, description="Seconds that a chunk of an answer may take, its wait included. Beyond it: 504."
    )
    cache_bytes: int | None = Field(
        None,
        ge=2**20,
        description="Bytes of answers that are kept for cells that come again, with the least recently used going first. By default none.",
    )
    client_budget_per_second: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds of computing per second that one client may use (see docs/serve.md for who is one). Beyond it requests get 429 "
        "with Retry-After, and streams wait. By default there is no such bound.",
    )
    client_budget_burst: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="Seconds of computing that a client can have saved up at most.",
    )
    client_budget_keys: int = Field(
        10_000,
        ge=1,
        description="Clients whose budgets are kept. Who has not been seen for longest is forgotten first.",
    )
    store_poll_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds between looks at the store: new versions, aliases and traffic are followed while running. By default never.",
    )
    max_loaded: int | None = Field(
        None,
        ge=1,
        description="Versions in memory, besides one that is being loaded. The least recently used is unloaded, and loaded again when it is "
        "asked for. By default all.",
    )
    admin_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="Bearer token of POST /v1/admin/reload, at least 16 characters. By default there is no such call.",
    )
    drain_seconds: float = Field(
        25,
        gt=0,
        le=27,
        description="Seconds that work in flight may take after SIGTERM. BentoML's parent process ends its worker by force after 30.",
    )
    stall_seconds: float = Field(
        60,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that one chunk may run. Beyond it /livez answers 503, so that the process is restarted.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least level of log lines, JSON on standard error."
    )

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.max_cells > self.max_queue_rows:
            raise ValueError(
                f"max_cells ({self.max_cells}) is above max_queue_rows ({self.max_queue_rows}): such a request could never run"
            )
        if self.max_body_bytes > self.max_body_bytes_in_flight:
            raise ValueError(
                f"max_body_bytes ({self.max_body_bytes}) is above max_body_bytes_in_flight ({self.max_body_bytes_in_flight}): "
                "such a body could never be read"
            )
        if self.upload_directory is not None:
            try:
                tempfile.TemporaryFile(dir=self.upload_directory).close()
            except OSError as error:
                raise ValueError(f"upload_directory ({self.upload_directory}) cannot be written to: {error}") from None
        if self.max_upload_bytes > self.max_upload_bytes_in_flight:
            raise ValueError(
                f"max_upload_bytes ({self.max_upload_bytes}) is above max_upload_bytes_in_flight ({self.max_upload_bytes_in_flight}): "
                "such an upload could never be read"
            )
        return self


def traces_exporter() -> Literal["otlp", "console"] | None:
    """Where spans go, by OpenTelemetry's own variables; None where requests are not traced, as by default.

    An endpoint alone is enough to ask for traces. The SDK reads everything else, see docs/traces.md.

    Raises:
        SettingsError: OTEL_TRACES_EXPORTER names what is not there.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    has_endpoint = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))
    match os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if has_endpoint else "none"):
        case "none":
            return None
        case "otlp" | "console" as exporter:
            return exporter
        case other:
            raise SettingsError(f"OTEL_TRACES_EXPORTER is {other!r}: it must be otlp, console or none.")


def read_settings() -> Settings:
    """Settings from the environment.

    Raises:
        SettingsError: names the variable, what it holds and what is allowed.
    """
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    if unknown := sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known | OTHERS):
        raise SettingsError(f"{unknown[0]} is no setting. The settings are: {', '.join(sorted(known))}.")
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = PREFIX + str(first["loc"][0]).upper() if first["loc"] else "The settings"
        is_secret = first["loc"] == ("admin_token",)
        value = f" is {first['input']!r}" if first["loc"] and not is_secret else ""
        raise SettingsError(f"{name}{value}: {first['msg']}.") from None
