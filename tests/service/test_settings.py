"""Settings from the environment."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import OTHERS, PREFIX, Settings, SettingsError, read_settings, traces_exporter


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that runs the tests reaches them."""
    for name in [name for name in os.environ if name.upper().startswith(PREFIX)]:
        monkeypatch.delenv(name)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without variables the defaults hold; a variable replaces one."""
    monkeypatch.delenv("CELLSERVE_STORE", raising=False)
    assert read_settings().store == Path("models_store")
    monkeypatch.setenv("CELLSERVE_STORE", "/models")
    monkeypatch.setenv("CELLSERVE_BATCH_ROWS", "64")
    assert (read_settings().store, read_settings().batch_rows) == (Path("/models"), 64)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("CELLSERVE_BATCH_ROWS", "0", "CELLSERVE_BATCH_ROWS is '0'"),
        ("CELLSERVE_BATCH_ROWS", "many", "CELLSERVE_BATCH_ROWS is 'many'"),
        ("CELLSERVE_PROVIDER", "tpu", "CELLSERVE_PROVIDER is 'tpu'"),
        ("CELLSERVE_THREADS", "-2", "CELLSERVE_THREADS"),
        ("CELLSERVE_UNKNOWN", "1", "CELLSERVE_UNKNOWN is no setting. The settings are: CELLSERVE_"),
        ("CELLSERVE_MAX_CELLS", "999999999", "above max_queue_rows"),
        ("CELLSERVE_MAX_BODY_BYTES", "9999999999", "could never be read"),
        ("CELLSERVE_MAX_UPLOAD_BYTES", "99999999999", "such an upload could never be read"),
        ("CELLSERVE_UPLOAD_DIRECTORY", "/nowhere", "CELLSERVE_UPLOAD_DIRECTORY is '/nowhere'"),
        ("CELLSERVE_UPLOAD_DIRECTORY", "/proc", r"upload_directory \(/proc\) cannot be written to"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, found: str) -> None:
    """An unknown variable, a value that is not allowed and two that contradict each other are named."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=found):
        read_settings()


def test_a_secret_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is too short is refused by name, without what it was; a good one shows nowhere either."""
    monkeypatch.setenv("CELLSERVE_ADMIN_TOKEN", "short")
    with pytest.raises(SettingsError, match="CELLSERVE_ADMIN_TOKEN") as refused:
        read_settings()
    assert "short" not in str(refused.value).replace("too_short", "")
    monkeypatch.setenv("CELLSERVE_ADMIN_TOKEN", "long enough to be one")
    assert "long enough" not in repr(read_settings())


def test_every_setting_says_what_it_does() -> None:
    """Each field carries the sentence that stands in docs/serve.md."""
    for field in Settings.model_fields.values():
        assert field.description
        assert field.description.endswith(".") or "413" in field.description or "429" in field.description


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", "0"),
        ("threads", "1025"),
        ("threads", "two"),
        ("batch_rows", "4097"),
        ("batch_rows", "64.5"),
        ("batch_rows", ""),
        ("max_queue_rows", "-1"),
        ("max_cells", "0"),
        ("max_body_bytes", "1023"),
        ("max_decoded_bytes", "1e400"),
        ("body_timeout_seconds", "0"),
        ("body_timeout_seconds", "nan"),
        ("timeout_seconds", "-1"),
        ("timeout_seconds", "a minute"),
        ("store_poll_s", "0"),
        ("store_poll_s", "inf"),
        ("max_loaded", "0"),
        ("drain_seconds", "0"),
        ("drain_seconds", "60"),
        ("stall_seconds", "-1"),
        ("log_level", "LOUD"),
        ("log_level", "info"),
        ("provider", "CPU"),
        ("allow_provider_fallback", "perhaps"),
    ],
)
def test_no_wrong_value_starts_the_service(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Every wrong value is refused with the variable's full name and what it held, in one line."""
    variable = PREFIX + name.upper()
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"^{variable} is {value!r}: ") as refused:
        read_settings()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"MAX_CELLS": "300000"}, r"max_cells \(300000\) is above max_queue_rows \(262144\)"),
        ({"MAX_QUEUE_ROWS": "10"}, r"max_cells \(131072\) is above max_queue_rows \(10\)"),
        ({"MAX_BODY_BYTES_IN_FLIGHT": "2048"}, r"above max_body_bytes_in_flight \(2048\)"),
    ],
)
def test_settings_that_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], found: str
) -> None:
    """Two settings under which a request could never be answered are refused with both numbers."""
    for name, value in changes.items():
        monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(SettingsError, match=rf"^The settings: .*{found}"):
        read_settings()


def test_the_edge_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request as large as the queue can run."""
    monkeypatch.setenv("CELLSERVE_MAX_CELLS", "10")
    monkeypatch.setenv("CELLSERVE_MAX_QUEUE_ROWS", "10")
    assert read_settings().max_cells == read_settings().max_queue_rows == 10


def test_variables_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the same prefix that the trainer, the client and the tests read are let through; others are not."""
    for name in OTHERS:
        monkeypatch.setenv(name, "anything")
    read_settings()
    monkeypatch.setenv("CELLSERVE_BATCHROWS", "64")
    with pytest.raises(SettingsError, match=r"^CELLSERVE_BATCHROWS is no setting"):
        read_settings()


def test_settings_are_fixed() -> None:
    """A setting is read once and does not change while the service runs."""
    with pytest.raises(ValidationError):
        Settings().batch_rows = 1


def test_a_folder_of_settings_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A .env file in the working directory changes nothing: what is set stands in the environment alone."""
    (tmp_path / ".env").write_text("CELLSERVE_BATCH_ROWS=7\n")
    monkeypatch.chdir(tmp_path)
    assert read_settings().batch_rows == 1024


@pytest.mark.parametrize(
    ("environment", "exporter"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "True"}, None),
    ],
)
def test_traces(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], exporter: str | None) -> None:
    """OpenTelemetry's own variables say where spans go; without them there are none."""
    for name in ("TRACES_EXPORTER", "SDK_DISABLED", "EXPORTER_OTLP_ENDPOINT", "EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert traces_exporter() == exporter


def test_traces_that_are_not_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that is not there is named, with those that are."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(SettingsError, match="otlp, console or none"):
        traces_exporter()
