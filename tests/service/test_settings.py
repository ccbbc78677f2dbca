"""Settings from the environment."""

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, read_settings


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
    ],
)
def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, found: str) -> None:
    """An unknown variable, a value that is not allowed and two that contradict each other are named."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=found):
        read_settings()


def test_every_setting_says_what_it_does() -> None:
    """Each field carries the sentence that stands in docs/serve.md."""
    for field in Settings.model_fields.values():
        assert field.description
        assert field.description.endswith(".") or "413" in field.description or "429" in field.description
