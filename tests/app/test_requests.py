"""A request is a value: what it is drawn with is settled when it is made; and the queue is fair."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from app_tools import blocked
from PIL import Image
from safetensors import safe_open
from tiny.shared import randomised

from mole_diffusion.app.composing import ComposeRequest, compose
from mole_diffusion.app.exporting import ExportRequest, export
from mole_diffusion.app.jobs import Job, QueueFullError, Worker
from mole_diffusion.app.keeping import read
from mole_diffusion.app.library import add_file, add_gates
from mole_diffusion.app.metadata import PictureSettings
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import Gates
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.tabs.train import what_now
from mole_diffusion.app.train_request import TrainRequest
from mole_diffusion.app.training import can_resume, resume_training, start_training
from mole_diffusion.core.errors import MoLEError
from mole_diffusion.core.files import file_sha256
from mole_diffusion.core.shared_gates import SharedGates
from mole_diffusion.starter.location import STARTER, shared_gates_of, starter_experts

PROMPT = "a zorin boot, a fenna cat, a nibo dog and a woxan robot"
QUICK = {"backgrounds": False, "batch": 1, "preview_every": 0}


@contextmanager
def busy(studio: Studio) -> Iterator[None]:
    """Everything that is asked for inside the `with` block waits in the queue until its end."""
    job, go = blocked()
    studio.worker.submit(job)
    try:
        yield
    finally:
        go.set()


def drawn_with(job: Job) -> list[str]:
    """The experts in a finished drawing."""
    assert job.wait(300).state == "done", job.error
    return sorted(use.name for use in job.result[0].settings.experts)


def test_waiting_requests_keep_their_experts_gates_regions_and_seed(studio: Studio) -> None:
    session = studio.session("waiting")
    mask = Image.new("L", (64, 64), 255)
    request = ComposeRequest(prompt="a zorin boot", steps=1, seed=5, regions={"boot": mask})

    def submit(names: list[str]) -> Job:
        session.choose(names)
        return studio.submit(session, "compose", compose(studio, session, request))

    alone = submit(["boot", "monster", "clock"]).wait(300)
    with busy(studio):
        waiting = [submit(names) for names in (["boot", "monster", "clock"], ["boot", "cat"], ["dog"])]
        session.choose(["robot"])
        mask.paste(0, (0, 0, 64, 64))
        session.set_gates(session.cards, Gates(Path("nowhere")))
    assert [drawn_with(job) for job in waiting] == [["boot", "clock", "monster"], ["boot", "cat"], ["dog"]]
    drawn = [(job.result[0].settings.mixture, job.result[0].settings.gates) for job in waiting]
    assert drawn == [("gates", "trained"), ("auto", ""), ("gates", "fresh")]
    first, again = alone.result[0], waiting[0].result[0]
    assert again.settings == first.settings
    assert first.settings.gates_sha256
    assert again.path.read_bytes() == first.path.read_bytes()


def test_shared_gates_that_were_brought_refine_auto(studio: Studio, tmp_path: Path) -> None:
    session = studio.session("sharing")
    request = ComposeRequest(prompt="a zorin boot and a fenna cat", steps=2, seed=5)

    def draw() -> tuple[PictureSettings, bytes]:
        job = studio.submit(session, "compose", compose(studio, session, request)).wait(300)
        assert job.state == "done", job.error
        picture = job.result[0]
        return picture.settings, Image.open(picture.path).tobytes()

    session.choose(["boot", "cat"])
    before, pixels = draw()
    file = tmp_path / "mine.safetensors"
    randomised(SharedGates.load(shared_gates_of(STARTER))).save(file)
    assert add_gates(session, file) == ()
    other, refined = draw()
    assert (before.mixture, other.mixture) == ("auto", "auto")
    assert (before.gates_sha256, other.gates_sha256) == ("", file_sha256(file))
    assert refined != pixels
    kept = read(session.folder)
    assert kept is not None
    assert kept.shared == session.setup().shared
    session.set_shared(None)
    assert draw()[1] == pixels
    add_gates(session, file)
    session.use_model("another")
    assert session.setup().shared is None


def test_choosing_while_a_picture_is_drawn_changes_nothing_in_it(studio: Studio) -> None:
    session = studio.session("choosing")
    session.choose(["boot", "cat"])
    request = ComposeRequest(prompt="a zorin boot", steps=4)
    job = studio.submit(session, "compose", compose(studio, session, request))
    for _ in job.watch():
        if job.progress.done >= 1:
            session.choose(["dog", "robot"])
            break
    assert drawn_with(job) == ["boot", "cat"]


def test_an_expert_that_is_removed_stays_for_what_was_asked_before(studio: Studio) -> None:
    session = studio.session("removing")
    card = add_file(studio, session, starter_experts()["cat"].path, "mine")
    session.choose(["boot", "mine"])
    with busy(studio):
        request = ComposeRequest(prompt="a fenna cat", steps=1)
        job = studio.submit(session, "compose", compose(studio, session, request))
        session.remove("mine")
        assert card.path.exists()
    assert drawn_with(job) == ["boot", "mine"]
    other = ComposeRequest(prompt="a zorin boot", steps=1)
    studio.submit(session, "compose", compose(studio, session, other)).wait(300)
    assert not card.path.exists()


def test_a_queued_training_trains_the_experts_it_was_asked_for(studio: Studio) -> None:
    session = studio.session("training")
    session.choose(["boot", "cat"])
    request = TrainRequest(prompts=(PROMPT,), iterations=1, **QUICK)
    with busy(studio):
        training = start_training(studio, session, request)
        session.choose(["dog", "robot"])
    assert training.job.wait(400).state == "done", training.job.error
    with safe_open(training.job.result, "pt") as file:
        parts = json.loads(file.metadata()["parts"])
    assert [expert["name"] for expert in parts["unet"]["experts"]] == ["boot", "cat"]
    assert session.gates() is None
    trained = session.gates(["boot", "cat"])
    assert trained == Gates(training.job.result, 1, 1)


def test_half_trained_gates_are_not_used_unasked_and_are_marked(studio: Studio) -> None:
    session = studio.session("half")
    session.choose(["boot", "cat"])
    training = start_training(studio, session, TrainRequest(prompts=(PROMPT,), iterations=3, **QUICK))
    for _ in training.job.watch():
        if training.history:
            training.job.cancel()
    assert training.job.state == "cancelled"
    assert can_resume(training)
    assert session.gates() is None
    assert training.gates is not None
    assert training.gates.partly
    asked = session.setup()
    session.set_gates(training.setup.cards, training.gates)
    assert session.setup().gates_state == "partly trained"
    assert asked.gates_state == "fresh"
    session.choose(["dog", "robot"])
    first = training.gates
    before = first.path.read_bytes()
    assert resume_training(studio, session).job.wait(400).state == "done", training.job.error
    assert first.path.read_bytes() == before
    assert session.gates(["boot", "cat"]) == Gates(training.job.result, 3, 3)


def test_a_killed_server_leaves_the_gates_of_the_last_checkpoint(studio: Studio, tmp_path: Path) -> None:
    session = studio.session("killed")
    session.choose(["boot", "cat"])
    training = start_training(studio, session, TrainRequest(prompts=(PROMPT,), iterations=30, **QUICK))
    for _ in training.job.watch():
        if (training.folder / "gates.safetensors").is_file() and not training.job.asked_to_stop:
            shutil.copytree(session.folder, tmp_path / "left")
            training.job.cancel()
    found = Session(tmp_path / "left")
    assert found.training is not None
    gates = found.training.gates
    assert gates is not None
    assert gates.partly
    assert gates.iterations >= 1
    assert gates.path.parent == tmp_path / "left" / "gates"
    assert found.gates() is None, "nobody asked to draw with them"
    assert can_resume(found.training)
    assert f"Stopped after {gates.iterations} of 30" in what_now(found, found.training, found.training.job)
    again = Session(tmp_path / "left").training
    assert again is not None
    assert again.gates == gates, "they are taken once"


def test_an_export_takes_the_experts_it_was_asked_for(studio: Studio, tmp_path: Path) -> None:
    session = studio.session("exporting")
    session.choose(["boot", "cat"])
    with busy(studio):
        request = ExportRequest(prompts=(PROMPT,), steps=1, rank=2)
        job = studio.submit(session, "export", export(studio, session, request))
        session.choose(["dog", "robot"])
    assert job.wait(300).state == "done", job.error
    assert list(job.result.report.experts) == ["boot", "cat"]


def test_cancel_does_not_wait_for_the_end_of_a_step(studio: Studio) -> None:
    session = studio.session("cancelling")
    session.choose(["boot", "cat"])
    pipe = studio.base("starter")
    entered, go = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        go.wait(60)

    after: list[object] = []
    ahead = pipe.unet.down_blocks[0].register_forward_pre_hook(hold)
    behind = pipe.unet.up_blocks[-1].register_forward_hook(lambda *_: after.append(1))
    try:
        work = compose(studio, session, ComposeRequest(prompt="a zorin boot", steps=50))
        job = studio.submit(session, "compose", work)
        assert entered.wait(120)
        job.cancel()
        go.set()
        assert job.wait(60).state == "cancelled"
    finally:
        ahead.remove()
        behind.remove()
    assert not after
    assert not pipe.mixtures


@pytest.fixture
def queue() -> Iterator[Worker]:
    made = Worker(length=6, share=3)
    yield made
    made.close()


def occupied(queue: Worker) -> threading.Event:
    """The queue's worker is busy until the event."""
    job, go = blocked()
    queue.submit(job)
    while not job.progress.done:
        time.sleep(0.01)
    return go


def test_visitors_take_turns(queue: Worker) -> None:
    go = occupied(queue)
    order: list[str] = []

    def submit(name: str, visitor: str) -> Job:
        return queue.submit(Job("a", lambda job: order.append(name), visitor=visitor))

    jobs = [submit(name, name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    assert [queue.position(job) for job in jobs] == [1, 4, 6, 2, 3, 5]
    with pytest.raises(QueueFullError, match=r"6 pieces of work are waiting already \(the queue takes 6\)"):
        submit("d1", "d")
    go.set()
    for job in jobs:
        job.wait(10)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_limits_and_waits_are_told(queue: Worker) -> None:
    timed = [queue.submit(Job("a", lambda job: time.sleep(0.2), units=2)) for _ in range(2)]
    assert [job.wait(10).state for job in timed] == ["done", "done"]
    go = occupied(queue)
    jobs = [queue.submit(Job("a", lambda job: None, visitor="v", units=20)) for _ in range(3)]
    assert queue.place(jobs[0]).ahead == 1
    waits = [queue.place(job).seconds for job in jobs]
    assert all(wait is not None for wait in waits)
    assert 1.8 < waits[2] - waits[1] < 3  # type: ignore[operator]
    with pytest.raises(QueueFullError) as refused:
        queue.submit(Job("a", lambda job: None, visitor="v"))
    message = r"3 pieces of work are waiting already \(3 of them yours, and one visitor may have 3\);"
    assert refused.match(message + r" one more would be number 4, and would begin in about \d+ s: try again")
    assert queue.submit(Job("unknown", lambda job: None, visitor="w")) is not None
    other = queue.submit(Job("a", lambda job: None, visitor="x"))
    assert queue.place(other).seconds is None
    go.set()


def test_many_watchers_hold_no_threads(queue: Worker) -> None:
    job, go = blocked()
    queue.submit(job)

    async def crowd() -> tuple[list[str], int]:
        waiting = [asyncio.create_task(job.finish()) for _ in range(200)]
        await asyncio.sleep(0.1)
        during = threading.active_count()
        go.set()
        return [done.state for done in await asyncio.gather(*waiting)], during

    before = threading.active_count()
    states, during = asyncio.run(crowd())
    assert states == ["done"] * 200
    assert during <= before + 1
    assert not job._listeners


def test_the_end_waits_for_nothing_that_leaves_nothing_half_done() -> None:
    """A model that is opened for minutes cannot be stopped, and nobody needs it any more."""
    closing, go = Worker(4), threading.Event()
    opening = closing.submit(Job("open", lambda job: go.wait(60), awaited=False))
    while opening.state == "waiting":
        time.sleep(0.01)
    start = time.monotonic()
    closing.close()
    assert time.monotonic() - start < 5
    go.set()


def test_a_closed_studio_opens_no_model_any_more(tmp_path: Path) -> None:
    """Libraries build networks without weights while they open one, and in every thread."""
    made = Studio(tmp_path, device="cpu")
    while made.opening.state == "waiting":
        time.sleep(0.01)
    made.close()
    assert made.opening.state in ("done", "cancelled")


def test_a_closed_queue_takes_nothing() -> None:
    worker = Worker(2)
    worker.close()
    with pytest.raises(MoLEError, match="the app is closing"):
        worker.submit(Job("a", lambda job: None))
