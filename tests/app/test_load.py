"""Several visitors at once: nothing lost, nothing mixed (the long form is `make soak`)."""

from __future__ import annotations

import threading

import httpx
import psutil
from app_tools import Server
from load_tools import Record, compare, storm, visiting

from mole_diffusion.app import interface

#: Threads of the web server beside the app's: for files and small requests, and for uploads.
_WEB_THREADS = 40 + 2


def test_answers_under_load_are_those_drawn_alone(server: Server) -> None:
    record = Record()
    with visiting(server.url) as client:
        client.predict(prompt="a zorin boot", steps=1, api_name="/compose")
    before = psutil.Process(server.process.pid).num_threads()
    waited: list[float] = []

    def look() -> None:
        waited.append(httpx.get(f"{server.url}/config", timeout=30).elapsed.total_seconds())

    with record.watching(server.process.pid, 0.1):
        others = threading.Timer(1.0, look)
        others.start()
        storm(server.url, record, visitors=8, burst=5, kinds=6)
        others.join()
    assert not record.refused
    assert len(record.answers) == 40
    assert len({facts["mixture"] for _, _, facts in record.answers}) > 1
    assert not compare(server.url, record.answers)
    # No more than the threads for short work, and those with which the web server reads files.
    assert max(threads for _, threads, _ in record.sizes) <= before + interface._THREADS + _WEB_THREADS
    assert waited


def test_waiting_is_told_and_holds_no_thread(server: Server) -> None:
    """More calls wait than there are threads for short work, and a short call is answered meanwhile."""
    waiting, facts = interface._THREADS + 2, {"before_the_next": 0}
    with visiting(server.url) as client, visiting(server.url) as other:
        calls = [client.submit(prompt="a boot", steps=20, api_name="/compose")]
        calls += [client.submit(prompt="a boot", steps=1, api_name="/compose") for _ in range(waiting)]
        while facts["before_the_next"] < waiting and not all(call.done() for call in calls):
            facts = other.predict(api_name="/queue")
        assert facts["before_the_next"] >= waiting
        assert facts["yours"] == 0
        assert facts["seconds"] is None or facts["seconds"] >= 0
        for call in calls:
            call.result(timeout=300)
        assert client.predict(api_name="/queue")["yours"] == 0
