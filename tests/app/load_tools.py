"""Many visitors at once, and every answer against the same request drawn alone."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from gradio_client import Client
from gradio_client.client import Job as Call

#: Seconds that a visitor waits for the page itself.
_PATIENCE = 120
EXPERTS = ("boot", "monster", "clock", "cat", "dog", "robot", "teapot", "sneaker", "wolf", "car")


@dataclass(frozen=True)
class Asked:
    """A call of /compose."""

    experts: tuple[str, ...]
    seed: int
    strengths: tuple[tuple[str, float], ...] = ()
    mixture: str = "gates"

    @classmethod
    def any(cls, draws: random.Random, kinds: int) -> Asked:
        """One of a number of kinds of calls, so that many visitors ask for the same."""
        own = random.Random(draws.randrange(kinds))
        # The first set has trained gates.
        chosen = EXPERTS[:3] if own.random() < 0.3 else tuple(own.sample(EXPERTS, own.randint(1, 3)))
        strengths = ((chosen[0], own.choice((0.5, 0.75))),) if own.random() < 0.5 else ()
        return cls(chosen, own.randrange(1000), strengths, own.choice(("gates", "gates", "nla", "none")))

    def arguments(self) -> dict[str, Any]:
        """For `Client.submit`."""
        return {
            "prompt": "a zorin boot on the beach",
            "experts": list(self.experts),
            "seed": self.seed,
            "steps": 1,
            "mixture": self.mixture,
            "strengths": dict(self.strengths),
            "api_name": "/compose",
        }


@dataclass
class Record:
    """What came back.

    Attributes:
        answers: calls with the bytes of the picture file and the facts beside it.
        refused: messages of calls that were not answered with a picture.
        sizes: (seconds, threads, bytes) of the server over time.
    """

    answers: list[tuple[Asked, bytes, dict[str, Any]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    sizes: list[tuple[float, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, asked: Asked, call: Call, timeout: float) -> None:
        """Wait for a call and note what it brings."""
        try:
            file, facts = call.result(timeout=timeout)
            content = Path(file).read_bytes()
        except Exception as error:
            with self.lock:
                self.refused.append(f"{type(error).__name__}: {error}")
            return
        Path(file).unlink()
        with self.lock:
            self.answers.append((asked, content, facts))

    @contextmanager
    def watching(self, pid: int, every: float) -> Iterator[None]:
        """Measure the server inside the `with` block."""
        process, done, start = psutil.Process(pid), threading.Event(), time.monotonic()

        def look() -> None:
            while not done.wait(every):
                size = (time.monotonic() - start, process.num_threads(), process.memory_info().rss)
                self.sizes.append(size)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@contextmanager
def visiting(url: str) -> Iterator[Client]:
    """A program of its own, with a session of its own."""
    with tempfile.TemporaryDirectory() as folder:
        # Fifty that come at once share a processor or two: the first answer may take a while.
        client = Client(url, verbose=False, download_files=folder, httpx_kwargs={"timeout": _PATIENCE})
        try:
            yield client
        finally:
            client.close()


def visit(url: str, record: Record, draws: random.Random, kinds: int, burst: int, until: float) -> None:
    """Calls in bursts, each without waiting for the one before, until the time is up; one burst at least."""
    try:
        _visit(url, record, draws, kinds, burst, until)
    except Exception as error:
        with record.lock:
            record.refused.append(f"a visitor was turned away: {type(error).__name__}: {error}")


def _visit(url: str, record: Record, draws: random.Random, kinds: int, burst: int, until: float) -> None:
    while True:
        with visiting(url) as client:
            for _ in range(4):
                asked = [Asked.any(draws, kinds) for _ in range(burst)]
                calls = [client.submit(**one.arguments()) for one in asked]
                for one, call in zip(asked, calls, strict=True):
                    record.take(one, call, 1200)
                if time.monotonic() >= until:
                    return


def storm(
    url: str, record: Record, *, visitors: int, burst: int, kinds: int, seconds: float = 0, seed: int = 0
) -> None:
    """All visitors at once.

    Args:
        url: of the app.
        record: gets the answers.
        visitors: how many.
        burst: calls that a visitor makes at once.
        kinds: how many different calls there are.
        seconds: how long; each visitor makes one burst at least.
        seed: of what they ask for.
    """
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=visit, args=(url, record, random.Random(f"{seed} {i}"), kinds, burst, until))
        for i in range(visitors)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def compare(url: str, answers: Sequence[tuple[Asked, bytes, dict[str, Any]]]) -> list[str]:
    """What is not as if it had been drawn alone, a sentence each."""
    wrong: list[str] = []
    alone: dict[Asked, tuple[bytes, dict[str, Any]]] = {}
    with visiting(url) as client:
        for asked in dict.fromkeys(asked for asked, *_ in answers):
            file, facts = client.predict(**asked.arguments())
            alone[asked] = Path(file).read_bytes(), facts
    for asked, content, facts in answers:
        # Without gates for these experts the app draws by the prompt, and says so.
        gates = "gates" if facts["gates"] else "auto"
        mixture = gates if asked.mixture == "gates" else asked.mixture
        if sorted(facts["experts"]) != sorted(asked.experts) or facts["mixture"] != mixture:
            wrong.append(f"{asked} says that it was drawn with {facts}")
        if (content, facts) != alone[asked]:
            wrong.append(f"{asked} is not the picture that is drawn alone")
    return wrong
