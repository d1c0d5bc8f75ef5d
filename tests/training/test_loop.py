"""The training loop on a toy: it knows nothing of pictures, and goes on bitwise where it was stopped."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Guessing, toy_loop, toy_mixture, values_of

from mole_diffusion.core.errors import TrainingError, WriteError
from mole_diffusion.training import state as training_state
from mole_diffusion.training.loop import TrainingLoop
from mole_diffusion.training.objective import LossTerms, Parameters
from mole_diffusion.training.progress import TrainingEvent
from mole_diffusion.training.settings import LoopSettings
from mole_diffusion.training.state import Preparation

HERE = Path(__file__).parent
STATE = training_state.STATE_FILE


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "seconds": 0} for row in history]


def test_the_toy_learns_and_its_history_says_so(tmp_path: Path) -> None:
    mixture = toy_mixture()
    fresh = values_of(mixture)
    saved: list[int] = []
    options: dict[str, Any] = {"folder": tmp_path, "save": saved.append, "settings": {"iterations": 80}}
    result = toy_loop(mixture, **options).run()
    assert not result.stopped
    losses = [row["parts"]["guess"] for row in result.history]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), "the dog is all that is asked for"
    assert result.history[-1]["weights"]["dog"] > 0.8
    assert any(not torch.equal(value, fresh[name]) for name, value in values_of(mixture).items())
    first = result.history[0]
    assert first["iteration"] == 1
    assert first["weights"] == pytest.approx({"dog": 0.5, "cat": 0.5})
    assert first["loss"] == pytest.approx(first["parts"]["guess"] + 0.1 * first["balance"])
    lines = (tmp_path / training_state.HISTORY_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert saved == [1, 50, 80], "the first one early"


@pytest.mark.parametrize("halves", [1, 2])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path: Path, halves: int) -> None:
    whole, parts = toy_mixture(), toy_mixture()
    expected = toy_loop(whole, objective=Guessing(whole, halves=halves)).run()
    settings = {"settings": {"checkpoint_every": 3}}

    class Killed(BaseException):
        pass

    def kill(event: TrainingEvent) -> None:
        if event.iteration == 5:
            # As a power cut: the state is what the last checkpoint left, the gates are two iterations on.
            kept.append((tmp_path / STATE).read_bytes())
            raise Killed

    kept: list[bytes] = []
    objective = Guessing(parts, halves=halves)
    with pytest.raises(Killed):
        toy_loop(parts, objective=objective, folder=tmp_path, callback=kill, **settings).run()
    (tmp_path / STATE).write_bytes(kept[0])
    again = toy_mixture()
    objective = Guessing(again, seed=77, halves=halves)
    torch.manual_seed(5)
    result = toy_loop(again, objective=objective, folder=tmp_path, **settings).run(resume=True)
    assert_same(values_of(again), values_of(whole))
    assert without_seconds(result.history) == without_seconds(expected.history)


def test_the_loop_needs_no_pictures_and_no_diffusers(tmp_path: Path) -> None:
    """The same toy in a process in which nothing of pictures can be imported."""
    blocked = ["diffusers", "transformers", "peft", "PIL", "open_clip", "rich", "mole_diffusion.pictures"]
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from toy import toy_loop, toy_mixture, values_of
import torch
mixture = toy_mixture()
toy_loop(mixture, folder=Path({str(tmp_path)!r}), settings={{"progress": True}}).run()
torch.save(values_of(mixture), {str(tmp_path / "values.pt")!r})
loaded = [name for name in sys.modules if sys.modules[name] is not None]
assert not [name for name in loaded if name.startswith("mole_diffusion.pictures")], loaded
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "8/8" in done.stderr
    here = toy_mixture()
    toy_loop(here).run()
    found = torch.load(tmp_path / "values.pt", weights_only=True)
    for name, value in values_of(here).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["signal", "exception", "stop", "answer"])
def test_every_way_of_stopping_leaves_what_there_is(tmp_path: Path, how: str) -> None:
    mixture, whole = toy_mixture(), toy_mixture()
    toy_loop(whole).run()

    def interrupt(event: TrainingEvent) -> bool:
        if event.iteration == 3:
            if how == "exception":
                raise KeyboardInterrupt
            if how == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            elif how == "stop":
                loop.stop()
            else:
                return False
        return True

    loop = toy_loop(mixture, folder=tmp_path, callback=interrupt)
    handler = signal.getsignal(signal.SIGINT)
    if how in ("signal", "exception"):
        with pytest.raises(KeyboardInterrupt):
            loop.run()
    else:
        assert loop.run().stopped
    assert signal.getsignal(signal.SIGINT) is handler
    state = training_state.load_state(tmp_path)
    assert state is not None
    assert len(state["history"]) == 3
    assert len(toy_loop(mixture, folder=tmp_path).run().history) == 8
    assert_same(values_of(mixture), values_of(whole))


def test_events_and_previews() -> None:
    events: list[TrainingEvent] = []
    settings = {"settings": {"preview_every": 3}}
    toy_loop(toy_mixture(), callback=events.append, preview=lambda i: f"after {i}", **settings).run()
    assert [event.preview for event in events] == [
        None, None, "after 3", None, None, "after 6", None, None
    ]  # fmt: skip
    assert [event.iteration for event in events] == list(range(1, 9))
    assert events[-1].seconds_left == 0
    assert events[0].row["weights"].keys() == {"dog", "cat"}


def test_facts_decide_what_is_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_loop(toy_mixture(), folder=tmp_path, facts={"task": "dog", "size": 3}).run()
    other = toy_loop(toy_mixture(), folder=tmp_path, facts={"task": "cat", "size": 3})
    with pytest.raises(TrainingError, match="of another training\n  - task: 'cat' now, 'dog' in the check"):
        other.run(resume=True)
    result = other.run()
    assert "beginning anew" in caplog.text
    assert len(result.history) == 8
    with pytest.raises(TrainingError, match=r"resume is True, and there is no checkpoint in .*nowhere"):
        toy_loop(toy_mixture(), folder=tmp_path / "nowhere").run(resume=True)


def test_a_training_can_be_made_longer_and_not_shorter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant: dict[str, Any] = {"schedule": "constant"}
    whole, parts = toy_mixture(), toy_mixture()
    expected = toy_loop(whole, settings={**constant, "iterations": 8}).run()
    options = {"folder": tmp_path, "facts": {"task": "dog", "iterations": 3}}
    toy_loop(parts, **options, settings={**constant, "iterations": 3}).run()
    options["facts"] = {"task": "dog", "iterations": 8}
    result = toy_loop(toy_mixture(), **options, settings={**constant, "iterations": 8})
    for resume in (True, None):
        again = toy_mixture()
        result = toy_loop(again, **options, settings={**constant, "iterations": 8}).run(resume)
        assert_same(values_of(again), values_of(whole))
        assert without_seconds(result.history) == without_seconds(expected.history)
    with pytest.raises(TrainingError, match="iterations: 5 now, 8 are done in the checkpoint"):
        toy_loop(toy_mixture(), **options, settings={**constant, "iterations": 5}).run(True)
    assert len(toy_loop(toy_mixture(), **options, settings={**constant, "iterations": 5}).run().history) == 5
    assert "beginning anew" in caplog.text


KILLED_ELEVEN_TIMES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from toy import toy_loop, toy_mixture, values_of
torch.set_num_threads(1)
folder, chance = Path(sys.argv[1]), random.Random(0)
options = {"folder": folder / "run", "settings": {"iterations": 150, "checkpoint_every": 7}}
kills = 0
while True:
    child = os.fork()
    if child == 0:
        mixture = toy_mixture()
        toy_loop(mixture, **options).run()
        torch.save(values_of(mixture), folder / "values.pt")
        os._exit(0)
    if kills == 11:
        break
    time.sleep(chance.uniform(0.02, 0.12))
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (folder / "values.pt").exists(), kills
assert os.waitpid(child, 0)[1] == 0
"""


def test_killed_eleven_times_and_finished_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    """As `kill -9` does it, wherever it strikes; nothing is left of files that were being written."""
    whole = toy_mixture()
    toy_loop(whole, settings={"iterations": 150}).run()
    command = [sys.executable, "-c", KILLED_ELEVEN_TIMES, str(tmp_path)]
    paths = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "values.pt", weights_only=True), values_of(whole))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["history.jsonl", "state.pt"]
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 150


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_prepared(tmp_path: Path) -> None:
    class Untouched(Guessing):
        def prepare(self) -> None:
            raise AssertionError("work before the folder was tried")

    (tmp_path / "file").touch()
    mixture = toy_mixture()
    with pytest.raises(WriteError, match="cannot be written"):
        toy_loop(mixture, objective=Untouched(mixture), folder=tmp_path / "file" / "run").run()


def test_what_is_prepared_is_kept_piece_by_piece(tmp_path: Path) -> None:
    draws, told = torch.Generator(), []

    def pieces(stop: int, facts: dict[str, Any], count: int = 4) -> tuple[list[int], list[torch.Tensor]]:
        made: list[int] = []
        draws.manual_seed(3)

        def make(index: int) -> torch.Tensor:
            if index == stop:
                raise KeyboardInterrupt
            made.append(index)
            return torch.rand(2, generator=draws)

        kept = Preparation(tmp_path, facts, lambda done, total: told.append((done, total)))
        try:
            found = kept.pieces(count, make, draws.get_state, lambda state: draws.set_state(state))
        except KeyboardInterrupt:
            found = []
        return made, found

    expected = pieces(-1, {"a": 2})[1]
    assert told == [(i, 4) for i in range(1, 5)]
    assert pieces(2, {"a": 1, "iterations": 5})[0] == [0, 1]
    made, found = pieces(-1, {"a": 1, "iterations": 9})
    assert made == [2, 3]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert pieces(-1, {"a": 3})[0] == [0, 1, 2, 3], "another training's"
    assert pieces(-1, {"a": 3}, 3)[0] == [0, 1, 2]
    (tmp_path / "preparation.pt").write_bytes(b"damaged")
    assert pieces(-1, {"a": 3}, 3)[0] == [0, 1, 2]
    Preparation(tmp_path).clear()
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_ends_it_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    mixture = toy_mixture()

    def spoil(event: TrainingEvent) -> None:
        if event.iteration == 4:
            next(iter(mixture.gates.parameters())).data.fill_(float("nan"))

    objective = Guessing(mixture)
    settings = {"settings": {"checkpoint_every": 2}}
    loop = toy_loop(mixture, objective=objective, folder=tmp_path, callback=spoil, **settings)
    with pytest.raises(TrainingError, match=r"the loss is nan in iteration 5: \{'guess': nan"):
        loop.run()
    state = training_state.load_state(tmp_path)
    assert state is not None
    assert len(state["history"]) == 4
    assert objective.closed == 5, "the losses of the failed iteration are closed"


class Exploit:
    """What a pickle must not be let do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def changed(**entries: Any) -> Any:
    """Writes a state with other entries."""

    def write(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        torch.save({**state, **entries}, path)

    return write


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def exploit(path: Path) -> None:
    torch.save({"format_version": 2, "facts": Exploit(path.parent / "touched")}, path)


OTHER_GATES = {"toy": dict.fromkeys(values_of(toy_mixture()), torch.zeros(9))}
#: What may stand in place of a state, and what the error says.
SPOILT = {
    "empty": (lambda path: path.write_bytes(b""), "is no training state: it cannot be read"),
    "cut": (cut, "is no training state: it cannot be read"),
    "text": (lambda path: path.write_text("no state"), "is no training state: it cannot be read"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 2})), "it cannot be read|something else"),
    "unsafe": (exploit, "is no training state: it cannot be read"),
    "list": (lambda path: torch.save([1, 2, 3], path), "it holds something else"),
    "weights": (lambda path: torch.save({"a.weight": torch.zeros(2)}, path), "it holds something else"),
    "version": (changed(format_version=99), "format version 99; this version reads 2"),
    "lacking": (
        lambda path: torch.save({"format_version": 2, "facts": {}, "history": []}, path),
        "it has no learner, optimiser, objective",
    ),
    "kinds": (changed(history=3), "it is of another kind"),
    "other": (changed(learner=OTHER_GATES), "does not fit this training"),
    "lists": (changed(learner=[]), "does not fit this training"),
    "optimiser": (changed(optimiser={}), "does not fit this training"),
}


@pytest.mark.parametrize("resume", [None, True])
@pytest.mark.parametrize("kind", SPOILT)
def test_a_state_file_that_is_none_is_one_clear_line(tmp_path: Path, kind: str, resume: bool | None) -> None:
    toy_loop(toy_mixture(), folder=tmp_path).run()
    spoil, expected = SPOILT[kind]
    spoil(tmp_path / STATE)
    mixture = toy_mixture()
    fresh, before = values_of(mixture), (tmp_path / STATE).read_bytes()
    with pytest.raises(TrainingError, match=expected) as raised:
        toy_loop(mixture, folder=tmp_path).run(resume=resume)
    assert len(str(raised.value).splitlines()) == 1
    assert STATE in str(raised.value)
    assert not (tmp_path / "touched").exists(), "nothing in the file was executed"
    assert_same(values_of(mixture), fresh)
    assert (tmp_path / STATE).read_bytes() == before, "nothing is written over it"
    assert len(toy_loop(mixture, folder=tmp_path).run(resume=False).history) == 8


class Descent:
    """Bring two numbers to 3, without any gate."""

    def __init__(self, numbers: torch.Tensor, update: bool = True) -> None:
        self._numbers, self._update = numbers, update

    def prepare(self) -> None:
        pass

    def losses(self, iteration: int) -> Any:
        yield LossTerms((self._numbers - 3).square().sum(), {}, self._update)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_anything_with_parameters_can_be_trained(tmp_path: Path) -> None:
    """Also without gates: this is how experts and words are trained."""

    def loop(numbers: torch.Tensor, **settings: Any) -> TrainingLoop:
        learner = Parameters({"numbers": numbers}, lambda tensors: torch.optim.SGD(tensors, lr=0.1))
        given = LoopSettings(iterations=60, schedule="constant", gradient_clip=0, progress=False)
        return TrainingLoop(Descent(numbers), learner, given, folder=tmp_path, **settings)

    numbers = torch.tensor([0.0, 10.0], requires_grad=True)
    result = loop(numbers).run()
    torch.testing.assert_close(numbers.detach(), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    assert result.history[0]["loss"] == pytest.approx(9 + 49)
    again = torch.zeros(2, requires_grad=True)
    assert loop(again).run(resume=True).history == result.history
    assert torch.equal(again, numbers)
    with pytest.raises(TrainingError, match="does not fit this training: other tensors than here: numbers"):
        loop(torch.zeros(3, requires_grad=True)).run(resume=True)


def test_an_objective_that_never_updates_is_told() -> None:
    numbers = torch.zeros(2, requires_grad=True)
    learner = Parameters({"numbers": numbers}, lambda tensors: torch.optim.SGD(tensors, lr=0.1))
    loop = TrainingLoop(Descent(numbers, update=False), learner, LoopSettings(iterations=1, progress=False))
    with pytest.raises(TrainingError, match="asked for no update in iteration 1"):
        loop.run()


def test_frozen_networks_are_put_back_and_nothing_frozen_can_train() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight.requires_grad_(False)
    second.eval()
    other = torch.nn.Parameter(torch.zeros(1))
    with training_state.frozen([first, second], [other]):
        assert not any(p.requires_grad for module in (first, second) for p in module.parameters())
        assert not first.training
    assert first.training
    assert not second.training
    assert [p.requires_grad for p in second.parameters()] == [False, True]
    with (
        pytest.raises(TrainingError, match="what trains is part of a frozen network"),
        training_state.frozen([first], [first.weight]),
    ):
        pass
    assert first.weight.requires_grad
