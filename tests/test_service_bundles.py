"""Bundles come, go and are bad, while the service runs."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.settings import Settings
from shared import times
from shared.bundle import MANIFEST, point_current
from shared.database import catalogue_revision, items
from shared.retrieval import Mode
from tests.faults import fault
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, counted, ids_of, json_of, serving, until
from tests.worlds import BrokenIndex, circle, cyclic, write_bundle

QUICK = {"bundle_poll_seconds": 0.02, "catalogue_poll_seconds": 0.02}


async def failures(upnext: Running) -> float:
    """The counter of bundles that could not be served."""
    return await counted(upnext, "upnext_bundle_load_failures_total")


async def test_without_a_bundle_then_with_one(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, None, **QUICK) as upnext:
        assert json_of(await upnext.http.get("/livez")) == {"status": "ok"}
        body = assert_problem(await upnext.http.get("/readyz"), 503, "not_ready", detail="python -m trainer")
        assert body["checks"]["redis"] == "ok"
        assert "CURRENT" in body["checks"]["bundle"]
        assert_problem(await upnext.http.get("/recommend/u"), 503, "no_bundle", detail="python -m trainer")
        assert json_of(await upnext.http.get("/info"))["bundle"] is None
        assert json_of(await upnext.http.get("/models")) == {"version": None, "models": []}
        await upnext.view("u", "3")  # events are taken all the same
        write_bundle(upnext.settings.bundles, cyclic())
        await until(lambda: upnext.services.live.serving is not None)
        assert (await upnext.ids("u"))[0] == "4"
        assert json_of(await upnext.http.get("/readyz"))["checks"]["bundle"] == "ok"


async def test_swap_keeps_live_changes(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(12), **QUICK) as upnext:
        await upnext.view("u", "12")
        await upnext.put("2", withdrawn=True)
        await upnext.put("13", title="Baker's dozen")  # no bundle knows it yet
        assert (await upnext.ids("u"))[0] == "1"
        write_bundle(upnext.settings.bundles, cyclic(13), version="next")
        await until(lambda: upnext.services.live.now_serving().bundle.version == "next")
        answer = await upnext.ask("u")
        assert answer["model"]["version"] == "next"
        assert (answer["items"][0]["item_id"], answer["items"][0]["title"]) == ("13", "Baker's dozen")
        assert "2" not in ids_of(answer)
        assert json_of(await upnext.http.get("/items/13"))["categories"] == ["parity:odd"]


@fault("A bundle is damaged, cut short or cannot be read")
@pytest.mark.parametrize("damage", ["missing", "byte", "cut", "unreadable", "manifest", "renamed", "current"])
async def test_a_bad_bundle_leaves_the_old_one_live(tmp_path: Path, redis_server: RedisServer, damage: str) -> None:
    async with serving(tmp_path, redis_server, cyclic(), **QUICK) as upnext:
        bundles = upnext.settings.bundles
        bad = write_bundle(bundles, cyclic(13), version="bad", current=False)
        match damage:
            case "missing":
                shutil.rmtree(bad)
            case "byte":
                file = bad / "models" / "sasrec" / "vectors.npy"
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(bytes(data))
            case "cut":
                file = bad / "models" / "sasrec" / "encoder.onnx"
                file.write_bytes(file.read_bytes()[:-100])
            case "unreadable":  # whatever the reason: permissions mean nothing to root, under whom tests may run
                (bad / "items.jsonl").unlink()
                (bad / "items.jsonl").mkdir()
            case "manifest":
                (bad / MANIFEST).write_text("{")
            case "renamed":
                bad.rename(bundles / "other")
                (bundles / "bad").symlink_to("nowhere")
        if damage == "current":
            (bundles / "CURRENT").write_text("../../etc\n")
        else:
            point_current(bundles, "bad")
        await until(lambda: upnext.services.live.bundle_failure is not None)
        assert (await upnext.ask("u"))["model"]["version"] == "2000-03-01T00-00-00Z-test"
        await upnext.view("u", "3")
        assert (await upnext.ids("u"))[0] == "4"
        ready = json_of(await upnext.http.get("/readyz"))
        assert ready["status"] == "degraded"
        assert ready["checks"]["bundle"] != "ok"
        assert await counted(upnext, "upnext_bundle_current") == 0
        await upnext.services.live.follow_bundle()  # not tried again until CURRENT changes
        assert await failures(upnext) == 1
        write_bundle(bundles, cyclic(14), version="good")
        await until(lambda: upnext.services.live.now_serving().bundle.version == "good")
        assert json_of(await upnext.http.get("/readyz"))["checks"]["bundle"] == "ok"
        async with asyncio.timeout(60):  # said when memory has been given back, a moment after it is live
            while await counted(upnext, "upnext_bundle_current") != 1:  # noqa: ASYNC110 - no event says it
                await asyncio.sleep(0.01)


@fault("A search in an HNSW index fails")
async def test_an_index_that_fails_is_told_and_answers_are_right(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(), retrieval=Mode.HNSW, **QUICK) as upnext:
        live = upnext.services.live
        await upnext.view("u", "3")
        found = await upnext.ids("u")
        assert found[0] == "4"
        assert await counted(upnext, "upnext_index_failed") == 0
        live.now_serving().bundle.models["sasrec"].retriever.index = BrokenIndex()
        assert await upnext.ids("u") == found
        assert await upnext.ids("u") == found
        await live.follow_bundle()
        assert await counted(upnext, "upnext_index_failed") == 1
        write_bundle(tmp_path / "bundles", cyclic(), version="next")
        await until(lambda: live.now_serving().bundle.version == "next")
        await live.follow_bundle()
        assert await counted(upnext, "upnext_index_failed") == 0


async def test_a_bundle_without_a_required_model_leaves_the_old_one_live(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with serving(tmp_path, redis_server, cyclic(), **QUICK, required_models="bert4rec, sasrec") as upnext:
        bundles = upnext.settings.bundles
        write_bundle(bundles, cyclic(13, models=("sasrec",)), version="half")
        await until(lambda: upnext.services.live.bundle_failure is not None)
        assert (await upnext.ask("u"))["model"]["version"] == "2000-03-01T00-00-00Z-test"
        ready = json_of(await upnext.http.get("/readyz"))
        assert ready["status"] == "degraded"
        assert "lacks bert4rec" in ready["checks"]["bundle"]
        assert await failures(upnext) == 1
        write_bundle(bundles, cyclic(14, models=("newcomer", "sasrec", "bert4rec")), version="more")
        await until(lambda: upnext.services.live.now_serving().bundle.version == "more")
        assert json_of(await upnext.http.get("/readyz"))["checks"]["bundle"] == "ok"


async def test_without_its_required_models_the_service_is_not_ready(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(), required_models="ranker") as upnext:
        body = assert_problem(await upnext.http.get("/readyz"), 503, "not_ready")
        assert "lacks ranker" in body["checks"]["bundle"]


@pytest.mark.parametrize("bad", ["damaged", "lacking", "unreadable"])
async def test_who_starts_while_the_newest_is_bad_serves_the_one_before(
    tmp_path: Path, redis_server: RedisServer, bad: str
) -> None:
    bundles = tmp_path / "bundles"
    write_bundle(bundles, cyclic(models=("sasrec",)), version="before")
    newest = write_bundle(bundles, cyclic(14, models=("bert4rec",)), version="newest")
    if bad == "damaged":
        (newest / MANIFEST).write_text("{")
    if bad == "unreadable":
        (bundles / "CURRENT").write_text("../../etc\n")
    async with serving(tmp_path, redis_server, None, **QUICK, required_models="sasrec") as upnext:
        assert (await upnext.ask("u"))["model"]["version"] == "before"
        ready = json_of(await upnext.http.get("/readyz"))
        assert ready["status"] == "degraded"
        assert ready["checks"]["bundle"] != "ok"
        assert await failures(upnext) == 1
        write_bundle(bundles, cyclic(13), version="good")
        await until(lambda: upnext.services.live.now_serving().bundle.version == "good")
        assert json_of(await upnext.http.get("/readyz"))["checks"]["bundle"] == "ok"


def test_names_of_required_models_stand_with_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPNEXT_REQUIRED_MODELS", " sasrec,bert4rec ,")
    assert Settings().required_models == ("sasrec", "bert4rec")


@pytest.mark.parametrize("where", ["encoder", "vectors"])
async def test_a_bundle_whose_numbers_are_not_finite_is_not_served(
    tmp_path: Path, redis_server: RedisServer, where: str
) -> None:
    async with serving(tmp_path, redis_server, cyclic(), **QUICK) as upnext:
        broken = replace(cyclic(), models=("sasrec",))
        if where == "encoder":
            broken = replace(broken, tables={"sasrec": circle(12) * float("nan")})
        else:
            vectors = np.eye(12, dtype=np.float32)
            vectors[3, 0] = np.nan
            broken = replace(broken, vectors=vectors)
        write_bundle(upnext.settings.bundles, broken, version="nan")
        await until(lambda: upnext.services.live.bundle_failure is not None)
        assert "not finite" in str(upnext.services.live.bundle_failure)


@fault("A bundle is copied bit by bit")
async def test_a_bundle_whose_files_arrive_late_goes_live(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.bundles.FIRST_RETRY", 0.05)
    async with serving(tmp_path, redis_server, cyclic(), **QUICK) as upnext:
        bundles = upnext.settings.bundles
        late = write_bundle(bundles, cyclic(13), version="late", current=False)
        late.rename(bundles / "on-its-way")
        point_current(bundles, "late")
        await until(lambda: upnext.services.live.bundle_failure is not None)
        files = sorted(file for file in (bundles / "on-its-way").rglob("*") if file.is_file())
        for file in files:  # the manifest among them: it may be there before what it names
            place = late / file.relative_to(bundles / "on-its-way")
            place.parent.mkdir(parents=True, exist_ok=True)
            whole = file.read_bytes()
            place.write_bytes(whole[: len(whole) // 2])
            await asyncio.sleep(0.02)
            await upnext.view("u", "3")
            answer = await upnext.ask("u")
            assert (answer["model"]["version"], ids_of(answer)[0]) == ("2000-03-01T00-00-00Z-test", "4")
            place.write_bytes(whole)
        await until(lambda: upnext.services.live.now_serving().bundle.version == "late")
        assert upnext.services.live.bundle_failure is None
        assert await failures(upnext) >= 1


async def test_a_loaded_row_gives_way_to_the_bundle_and_a_call_does_not(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with serving(tmp_path, redis_server, cyclic(), **QUICK) as upnext:
        later = {"title": "loaded", "available_from": times.now() + times.DAY, "withdrawn": False, "loaded": True}
        async with upnext.services.catalogue.engine.begin() as connection:
            await connection.execute(catalogue_revision.update().values(revision=9))
            await connection.execute(items.insert(), [{"item_id": "2", "revision": 9, **later}])
        await until(lambda: upnext.services.live.revision == 9)
        assert (await upnext.bring(["1"], n=1))["items"][0]["title"] == "Item 2"
        assert json_of(await upnext.http.get("/items/2"))["title"] == "Item 2"
        assert (await upnext.put("2", title="called"))["available_from"] == "2000-01-03T00:00:00Z"
        assert (await upnext.bring(["1"], n=1))["items"][0]["title"] == "called"


async def test_loaded_rows_that_a_bundle_has_take_no_memory_and_count_where_the_next_one_lacks_them(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with serving(tmp_path, redis_server, cyclic(12), **QUICK) as upnext:
        live = upnext.services.live
        loaded = [{"item_id": f"{n}", "title": f"Loaded {n}", "withdrawn": False, "revision": 9, "loaded": True}
                  for n in range(10, 15)]  # fmt: skip
        async with upnext.services.catalogue.engine.begin() as connection:
            await connection.execute(catalogue_revision.update().values(revision=9))
            await connection.execute(items.insert(), loaded)
        await until(lambda: live.revision == 9)
        assert [n for n in range(1, 15) if live.change_of(f"{n}")] == [13, 14], "10 to 12 are the bundle's"
        assert json_of(await upnext.http.get("/items/10"))["revision"] is None
        assert json_of(await upnext.http.get("/items/13"))["revision"] == 9

        write_bundle(tmp_path / "bundles", cyclic(11), version="fewer")
        await until(lambda: live.change_of("12") is not None)
        assert live.change_of("11") is None
        found = json_of(await upnext.http.get("/items/12"))
        assert (found["title"], found["in_bundle"], found["revision"]) == ("Loaded 12", False, 9)
        assert "12" in await upnext.ids("nobody", n=100)


async def test_only_a_bad_bundle(tmp_path: Path, redis_server: RedisServer) -> None:
    path = write_bundle(tmp_path / "bundles", cyclic())
    (path / "items.jsonl").write_text("")
    async with serving(tmp_path, redis_server, None) as upnext:
        assert_problem(await upnext.http.get("/recommend/u"), 503, "no_bundle", detail="items.jsonl")
        assert_problem(await upnext.http.get("/readyz"), 503, "not_ready", detail="items.jsonl")


async def test_back_to_the_live_version_clears_the_failure(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(), **QUICK) as upnext:
        point_current(upnext.settings.bundles, "no-such")
        await until(lambda: upnext.services.live.bundle_failure is not None)
        point_current(upnext.settings.bundles, "2000-03-01T00-00-00Z-test")
        await until(lambda: upnext.services.live.bundle_failure is None)


async def test_a_replaced_bundle_goes_without_the_collector_of_garbage(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """The collector is told to leave bundles alone: one that needed it would stay for ever."""
    async with serving(tmp_path, redis_server, cyclic(), **QUICK) as upnext:
        live = upnext.services.live
        await upnext.view("u", "3")
        await upnext.ask("u")
        json_of(await upnext.http.put("/items/4", json={"title": "Four"}))
        json_of(await upnext.http.get("/items/3/similar"))
        bundle = live.now_serving().bundle
        parts = (live.now_serving(), bundle, bundle.popularity, *(model.encoder for model in bundle.models.values()))
        former: list[weakref.ref[object]] = [weakref.ref(part) for part in parts]
        del bundle, parts
        gc.collect()
        gc.disable()
        try:
            write_bundle(upnext.settings.bundles, cyclic(14), version="next")
            await until(lambda: live.now_serving().bundle.version == "next")
            await upnext.ask("u")
            await until(lambda: all(reference() is None for reference in former))
        finally:
            gc.enable()
