"""Several visitors at once: nothing lost, nothing mixed (the long form is `make soak`)."""

from __future__ import annotations

import threading

import httpx
import psutil
from app_tools import Server
from load_tools import Record, compare, storm, visiting


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
    # Forty calls wait, and whoever waits holds no thread.
    assert max(threads for _, threads, _ in record.sizes) < before + 28
    assert waited


def test_waiting_is_told(server: Server) -> None:
    with visiting(server.url) as client, visiting(server.url) as other:
        calls = [client.submit(prompt="a boot", steps=10, api_name="/compose") for _ in range(4)]
        facts = {"before_the_next": 0}
        while facts["before_the_next"] < 2 and not all(call.done() for call in calls):
            facts = other.predict(api_name="/queue")
        assert facts["before_the_next"] >= 2
        assert facts["yours"] == 0
        assert facts["seconds"] is None or facts["seconds"] >= 0
        for call in calls:
            call.result(timeout=300)
        assert client.predict(api_name="/queue")["yours"] == 0
