"""Models while running: what appears in the store is verified and takes its place at once, what is broken never does, memory is bounded."""

import asyncio
import gc
import logging
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from service import metrics
from service.contract.store import ModelId, Store
from service.contract.traffic import Split, Traffic
from service.errors import ModelNotFound, ModelNotReady
from service.inference import models as models_module
from service.inference.models import Models
from service.inference.session import Runtime
from tests.builders import counts, write_artifact, write_mismatch


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One model of one version, without aliases."""
    write_artifact(tmp_path)
    return Store(tmp_path)


def started(store: Store, max_loaded: int | None = None) -> Models:
    """The models of a store, loaded."""
    models = Models(store=store, runtime=Runtime(), max_loaded=max_loaded)
    models.load_all()
    return models


def metric(name: str, **labels: str) -> float | None:
    """The value of one series."""
    return REGISTRY.get_sample_value(name, labels)


class TestExchange:
    """What a name means changes in one step."""

    def test_a_new_version(self, store: Store) -> None:
        """It appears, is loaded and is what the name means; a request that began before keeps the old one until it ends."""
        models = started(store)
        held = models.get("tiny")
        before = held.encode(counts(3))
        write_artifact(store.root, version="2", seed=5)
        assert models.get("tiny").id == "tiny@1"
        models.refresh()

        assert models.get("tiny").id == "tiny@2"
        assert models.get("tiny@1") is held
        assert models.states() == {"tiny@1": "ready", "tiny@2": "ready"}
        assert models.get("tiny").encode(counts(3)).tobytes() != before.tobytes()
        assert held.encode(counts(3)).tobytes() == before.tobytes()

    def test_an_alias(self, store: Store) -> None:
        """An alias that moves moves what the name means, counted once; looking again changes nothing."""
        write_artifact(store.root, version="2", seed=5)
        store.set_alias(ModelId("tiny", "1"))
        models = started(store)
        assert models.get("tiny").id == "tiny@1"
        swaps = metric("cellserve_model_swaps_total", model="tiny") or 0
        store.set_alias(ModelId("tiny", "2"))
        models.refresh()
        models.refresh()

        assert models.get("tiny").id == models.get("tiny@default").id == "tiny@2"
        assert metric("cellserve_model_swaps_total", model="tiny") == swaps + 1

    def test_a_version_that_goes(self, store: Store) -> None:
        """Its session ends when the last request that holds it does, and not before."""
        write_artifact(store.root, version="2", seed=5)
        models = started(store)
        held = models.get("tiny@1")
        before, ended = held.encode(counts(3)), weakref.ref(held)
        sessions_ended = weakref.ref(held.sessions["encode"])
        shutil.rmtree(store.root / "tiny/1")
        models.refresh()

        with pytest.raises(ModelNotFound):
            models.get("tiny@1")
        assert (
            metric("cellserve_model_info", model="tiny", version="1", family="made_for_tests", provider="cpu") is None
        )
        assert held.encode(counts(3)).tobytes() == before.tobytes()
        gc.disable()  # references alone must do it
        try:
            del held
            assert ended() is None
            assert sessions_ended() is None
        finally:
            gc.enable()

    def test_series_of_a_version_that_goes(self, store: Store) -> None:
        """What was measured of it is exported as long as a request holds it, and forgotten then; that of others stays."""
        write_artifact(store.root, version="2", seed=5)
        models = started(store)
        held = models.get("tiny@1")
        for version in ("1", "2"):
            metrics.CELLS.labels("tiny", version, "embed").inc()
            metrics.LIBRARY_SIZE.observe(("tiny", version), np.ones(3, dtype=np.float32))
        shutil.rmtree(store.root / "tiny/1")
        models.refresh()

        def has(version: str) -> set[bool]:
            labels = {"model": "tiny", "version": version}
            cells = metric("cellserve_cells_total", **labels, task="embed")
            return {cells is not None, metric("cellserve_library_size_count", **labels) is not None}

        assert has("1") == has("2") == {True}
        del held
        models.refresh()
        assert has("1") == {False}
        assert has("2") == {True}

    def test_a_model_that_comes_and_goes(self, store: Store) -> None:
        """A new name answers without a restart, and is unknown again once its directory is gone."""
        models = started(store)
        write_artifact(store.root, name="other")
        models.refresh()
        assert models.get("other").id == "other@1"
        shutil.rmtree(store.root / "other")
        models.refresh()

        with pytest.raises(ModelNotFound):
            models.get("other")
        assert models.problem() is None
        assert models.problems() == {}

    def test_a_version_that_is_replaced(self, store: Store) -> None:
        """What is in memory is served even if someone changes the files; after it was unloaded, the other content is refused."""
        write_artifact(store.root, version="2", seed=5)
        models = started(store, max_loaded=1)
        assert models.states() == {"tiny@1": "unloaded", "tiny@2": "ready"}
        models.load_now(ModelId("tiny", "1"))
        shutil.rmtree(store.root / "tiny/2")
        write_artifact(store.root, version="2", seed=6)

        with pytest.raises(ModelNotReady, match="a version never changes"):
            models.load_now(ModelId("tiny", "2"))

    def test_polling(self, store: Store) -> None:
        """A thread looks every so often and follows; one failed look does not end it."""
        models = Models(store=store, runtime=Runtime())
        thread = models.start(poll_seconds=0.02)
        write_artifact(store.root, version="2", seed=5)
        for _ in range(200):
            if "tiny@2" in models.states() and models.states()["tiny@2"] == "ready":
                break
            threading.Event().wait(0.02)
        assert models.get("tiny").id == "tiny@2"
        models.stop()
        thread.join(5)
        assert not thread.is_alive()

    def test_two_processes_agree(self, store: Store) -> None:
        """Each looks at the store for itself, and they mean the same by a name and send the same requests to the same version."""
        write_artifact(store.root, version="2", seed=5)
        store.set_alias(ModelId("tiny", "1"))
        one, other = started(store), started(store)
        write_artifact(store.root, version="3", seed=6)
        store.set_alias(ModelId("tiny", "3"), "canary")
        store.set_traffic("tiny", Traffic(split=Split(to="canary", share=0.5)))
        one.refresh()
        other.refresh()

        chosen = [one.choose("tiny", str(number)) for number in range(100)]
        assert chosen == [other.choose("tiny", str(number)) for number in range(100)]
        assert {str(model_id) for model_id in chosen} == {"tiny@1", "tiny@3"}


class TestBadVersions:
    """What cannot be served never takes the place of what can."""

    @pytest.mark.parametrize("fault", ["bytes", "golden", "half"])
    def test_newest(self, store: Store, fault: str) -> None:
        """A damaged, a wrong and a half-copied version are refused with the reason, and the name means what it did."""
        models = started(store)
        if fault == "golden":
            write_mismatch(store.root, version="2", seed=5)
        else:
            path = write_artifact(store.root, version="2", seed=5)
            (path / "encode.onnx").write_bytes(b"broken") if fault == "bytes" else (path / "decode.onnx").unlink()
        models.refresh()

        said = {"bytes": "encode.onnx", "golden": "golden cells differ", "half": "decode.onnx"}[fault]
        assert models.get("tiny").id == "tiny@1"
        assert models.problem() is None
        assert said in models.states()["tiny@2"]
        assert said in models.problems()["tiny"]
        assert "it still is tiny@1" in models.problems()["tiny"]
        assert metric("cellserve_model_failed", model="tiny", version="2") == 1
        assert metric("cellserve_store_problem", model="tiny") == 1
        with pytest.raises(ModelNotReady, match=said):
            models.get("tiny@2")

        # A better one after it takes its place, and the problem is over.
        write_artifact(store.root, version="3", seed=6)
        models.refresh()
        assert models.get("tiny").id == "tiny@3"
        assert models.problems() == {}
        assert metric("cellserve_store_problem", model="tiny") == 0

    def test_alias_to_a_bad_version(self, store: Store) -> None:
        """`default` and `canary` stay where they are when they are pointed at what is refused."""
        write_artifact(store.root, version="2", seed=5)
        store.set_alias(ModelId("tiny", "1"))
        store.set_alias(ModelId("tiny", "2"), "canary")
        models = started(store)
        write_mismatch(store.root, version="3", seed=6)
        store.set_alias(ModelId("tiny", "3"))
        store.set_alias(ModelId("tiny", "3"), "canary")
        models.refresh()
        models.refresh()

        assert (models.get("tiny").id, models.get("tiny@canary").id) == ("tiny@1", "tiny@2")
        assert "'default'" in models.problems()["tiny"]
        assert "'canary'" in models.problems()["tiny"]

    def test_it_is_tried_again_when_its_files_change(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """A refused version is not read at every look, but when a file of it has changed, or when it is asked for."""
        models = started(store)
        path = write_artifact(store.root, version="2", seed=5)
        good = (path / "encode.onnx").read_bytes()
        (path / "encode.onnx").write_bytes(b"broken")
        models.refresh()
        loads: list[Path] = []
        read = models_module.artifact.read
        monkeypatch.setattr(models_module.artifact, "read", lambda path: loads.append(path) or read(path))
        models.refresh()
        assert loads == []
        models.refresh(is_forced=True)
        assert len(loads) == 1
        (path / "encode.onnx").write_bytes(good)
        models.refresh()

        assert models.get("tiny").id == "tiny@2"
        assert metric("cellserve_model_failed", model="tiny", version="2") is None

    @pytest.mark.parametrize("file", ["aliases.json", "traffic.json"])
    def test_files_that_become_unreadable(self, store: Store, file: str, caplog: pytest.LogCaptureFixture) -> None:
        """What they said before holds, and the problem is reported once, not at every look."""
        write_artifact(store.root, version="2", seed=5)
        store.set_alias(ModelId("tiny", "1"))
        store.set_traffic("tiny", Traffic(split=Split(to="2", share=1)))
        models = started(store)
        (store.root / "tiny" / file).write_text("nonsense")
        with caplog.at_level(logging.ERROR, "cellserve.models"):
            for _ in range(3):
                models.refresh()

        assert models.get("tiny").id == "tiny@1"
        assert str(models.choose("tiny", "any")) == "tiny@2"
        assert file in models.problems()["tiny"]
        assert models.problem() is None
        assert len(caplog.records) == 1

    def test_an_alias_to_what_is_gone(self, store: Store) -> None:
        """While `default` points to a version whose files went away, it answers from memory."""
        write_artifact(store.root, version="2", seed=5)
        store.set_alias(ModelId("tiny", "1"))
        models = started(store)
        shutil.rmtree(store.root / "tiny/1")
        models.refresh()

        assert models.get("tiny").id == "tiny@1"
        assert "which is no version" in models.problems()["tiny"]

    def test_a_store_that_goes(self, store: Store) -> None:
        """A store that cannot be read at one moment takes nothing away."""
        models = started(store)
        store.root.rename(store.root.with_name("elsewhere"))
        try:
            models.refresh()
            assert models.get("tiny").id == "tiny@1"
            assert "cannot be read" in models.problems()[""]
            assert metric("cellserve_store_problem", model="") == 1
        finally:
            store.root.with_name("elsewhere").rename(store.root)
        models.refresh()
        assert models.problems() == {}

    def test_at_the_start(self, tmp_path: Path) -> None:
        """Where there is nothing good to keep, a broken default makes the process not ready; a repaired one makes it ready."""
        write_artifact(tmp_path)
        path = write_artifact(tmp_path, version="2", seed=5)
        good = (path / "encode.onnx").read_bytes()
        (path / "encode.onnx").write_bytes(b"broken")
        models = started(Store(tmp_path))
        assert "encode.onnx" in str(models.problem())
        (path / "encode.onnx").write_bytes(good)
        models.refresh()

        assert models.problem() is None
        assert models.get("tiny").id == "tiny@2"


class TestTraffic:
    """A share of the requests goes to a second version."""

    def test_shares(self, store: Store) -> None:
        """One in five of 2,000 ids goes to the canary, the same ones every time; raising the share sends nobody back."""
        write_artifact(store.root, version="2", seed=5)
        store.set_alias(ModelId("tiny", "1"))
        store.set_alias(ModelId("tiny", "2"), "canary")
        models = started(store)
        ids = [f"request-{number}" for number in range(2000)]

        def canaries(share: float) -> set[str]:
            store.set_traffic("tiny", Traffic(split=Split(to="canary", share=share)))
            models.refresh()
            return {one for one in ids if str(models.choose("tiny", one)) == "tiny@2"}

        some, more = canaries(0.2), canaries(0.5)
        assert 320 < len(some) < 480  # 400 expected; 4.5 standard deviations
        assert some < more
        assert canaries(0.0) == set()
        assert canaries(1.0) == set(ids)
        # Whoever says which version gets that one.
        assert str(models.choose("tiny@1", ids[0])) == str(models.choose("tiny@default", ids[0])) == "tiny@1"
        assert str(models.choose(None, ids[0])) == "tiny@2"

    def test_a_split_to_a_bad_version(self, store: Store) -> None:
        """Nothing goes to a version that is refused, and this is reported."""
        write_mismatch(store.root, version="2", seed=5)
        store.set_alias(ModelId("tiny", "1"))
        store.set_traffic("tiny", Traffic(split=Split(to="2", share=1.0), shadow="2"))
        models = started(store)

        assert str(models.choose("tiny", "any")) == "tiny@1"
        assert models.shadow_of(models.get("tiny")) is None
        assert "traffic.json names '2'" in models.problems()["tiny"]


class TestBound:
    """At most so many versions are in memory."""

    async def test_unload_and_reload(self, tmp_path: Path) -> None:
        """The least recently used goes, and comes back with the same bits when it is asked for."""
        for name in ("a", "b", "c"):
            write_artifact(tmp_path, name=name, seed=ord(name))
        models = started(Store(tmp_path), max_loaded=2)
        assert models.problem() is None  # each was verified, and is loaded when asked for
        assert models.states() == {"a@1": "unloaded", "b@1": "ready", "c@1": "ready"}
        with pytest.raises(ModelNotReady):
            models.get("a")
        bits = {name: (await models.obtain(name)).encode(counts(3)).tobytes() for name in ("a", "b", "c", "a", "b")}
        assert len(set(bits.values())) == 3
        assert set(map(str, models.loaded())) == {"a@1", "b@1"}
        await models.obtain("a")
        await models.obtain("c")

        assert set(map(str, models.loaded())) == {"a@1", "c@1"}
        for name, content in bits.items():
            assert (await models.obtain(name)).encode(counts(3)).tobytes() == content
            assert len(models.loaded()) <= 2

    async def test_many_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hundred requests for an unloaded version load it once, and the event loop goes on meanwhile."""
        for name in ("a", "b"):
            write_artifact(tmp_path, name=name)
        models = started(Store(tmp_path), max_loaded=1)
        loads: list[str] = []
        load = models_module.load
        monkeypatch.setattr(
            models_module, "load", lambda content, *rest: loads.append(content.manifest.name) or load(content, *rest)
        )
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        found = await asyncio.gather(*(models.obtain("a") for _ in range(100)))
        counting.cancel()
        assert loads == ["a"]
        assert {model.id for model in found} == {"a@1"}
        assert turns > 1

    async def test_exchange_with_one_place(self, store: Store) -> None:
        """With room for one version, the new one takes the place of the old, which was in use."""
        models = started(store, max_loaded=1)
        await models.obtain("tiny")
        write_artifact(store.root, version="2", seed=5)
        models.refresh()

        assert set(map(str, models.loaded())) == {"tiny@2"}
        assert models.problem() is None
        assert (await models.obtain("tiny@1")).id == "tiny@1"

    async def test_files_that_are_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An unloaded version that cannot be read again says so, makes the process not ready, and is tried again after a while."""
        for name in ("a", "b"):
            write_artifact(tmp_path, name=name)
        models = started(Store(tmp_path), max_loaded=1)
        (tmp_path / "a/1/genes.tsv").rename(tmp_path / "genes.tsv")
        with pytest.raises(ModelNotReady, match=r"genes\.tsv"):
            await models.obtain("a")
        assert r"genes.tsv" in str(models.problem())
        (tmp_path / "genes.tsv").rename(tmp_path / "a/1/genes.tsv")
        with pytest.raises(ModelNotReady, match=r"genes\.tsv"):
            await models.obtain("a")  # too early
        monkeypatch.setattr(models_module, "RETRY_SECONDS", 0.0)

        assert (await models.obtain("a")).id == "a@1"
        assert models.problem() is None

    def test_held(self, tmp_path: Path) -> None:
        """The gauge counts what is in memory, those included that only a request still holds."""
        for name in ("a", "b"):
            write_artifact(tmp_path, name=name)
        gc.collect()
        before = metric("cellserve_models_held") or 0
        models = started(Store(tmp_path), max_loaded=1)
        assert metric("cellserve_models_held") == before + 1
        held = models.get("b")
        models.load_now(ModelId("a", "1"))
        assert metric("cellserve_models_held") == before + 2
        del held
        assert metric("cellserve_models_held") == before + 1
