"""The tab "MoLE": train gates, inspect them, export a plain LoRA, and the Python that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from . import environment
from .heatmap import gate_map, loss_curve
from .jobs import Bench, Job, TrainingJob, check_name, export_command, training_command
from .library import Library
from .options import Options
from .settings import AUTO, NO_FILE, WITHOUT_GATES, SettingsError
from .training_text import concept, described, distinct, failure, lines, opened, training_status
from .ui import as_message

TRAIN, EXPORT, MAKE = "A training", "An export", "An installation"
STARTER = "starter"
_OBJECTIVES = ("collage", "clip", "both")
_WAIT = 1.0
ROOT = Path(__file__).resolve().parent.parent

# The host forgets its scripts when its page is reloaded; the work goes on.
bench = Bench()


class TrainingTab:
    """The tab's components.

    Args:
        library: files to choose from.
        options: where things are.
        checkpoints: the host's checkpoints, title -> file.
        last_run: gate weights of the last picture, or None.
    """

    def __init__(
        self,
        library: Library,
        options: Options,
        checkpoints: Callable[[], Mapping[str, str]],
        last_run: Callable[[], Any],
    ) -> None:
        self._library = library
        self._options = options
        self._checkpoints = checkpoints
        self._last_run = last_run

    def build(self) -> Any:
        """The tab as gradio blocks."""
        with gr.Blocks(analytics_enabled=False) as tab, gr.Tabs(elem_id="mole_tabs"):
            with gr.TabItem("Train gates", elem_id="mole_train"):
                self._train_page()
            with gr.TabItem("Inspect gates", elem_id="mole_inspect"):
                self._inspect_page()
            with gr.TabItem("Export a plain LoRA", elem_id="mole_export"):
                self._export_page()
            with gr.TabItem("Python for training", elem_id="mole_python"):
                self._python_page()
        return tab

    def _train_page(self) -> None:
        gr.HTML(as_message("Trains gates for some LoRAs in a process of its own; this web UI stays usable."))
        with gr.Row():
            with gr.Column():
                what = self._what_to_train()
                how = self._how_to_train()
                with gr.Row():
                    start = gr.Button("Train", variant="primary", elem_id="mole_train_start")
                    cancel = gr.Button("Cancel", elem_id="mole_train_cancel")
                    watch = gr.Button("Watch", elem_id="mole_train_watch")
                    refresh = gr.Button("Refresh lists", elem_id="mole_train_refresh")
            with gr.Column():
                status = gr.HTML("", elem_id="mole_train_status")
                curve = gr.HTML("", elem_id="mole_train_curve")
                preview = gr.Image(label="Preview", interactive=False, elem_id="mole_train_preview")
                log = gr.Textbox(label="Log", lines=8, interactive=False, elem_classes=["mole-log"])
        outputs = [status, curve, preview, log]
        start.click(self.train, [*what, *how], outputs, show_progress=False)
        watch.click(self.watch, [], outputs, show_progress=False)
        cancel.click(self.cancel, [], [status], show_progress=False)
        _, model, experts, *_ = what
        refresh.click(self.refresh, [], [experts, model], show_progress=False)

    def _what_to_train(self) -> list[Any]:
        name = gr.Textbox(label="Name of the gates", elem_id="mole_train_name")
        model = self._model_picker("mole_train_model")
        experts = gr.Dropdown(
            label="Experts (two or more LoRAs)",
            choices=self._library.experts(),
            value=[],
            multiselect=True,
            elem_id="mole_train_experts",
        )
        prompts = gr.Textbox(
            label="Prompts that name every expert's subject, one a line",
            lines=2,
            elem_id="mole_train_prompts",
        )
        concepts = gr.Textbox(
            label="What each expert knows, one a line (empty: the trigger in its file)",
            placeholder="dog = a sks dog | a dog",
            lines=2,
            elem_id="mole_train_concepts",
        )
        references = gr.Textbox(
            label="Folder with a folder of pictures per expert (empty: the experts draw some)",
            elem_id="mole_train_references",
        )
        return [name, model, experts, prompts, concepts, references]

    def _how_to_train(self) -> list[Any]:
        with gr.Row():
            objective = gr.Radio(list(_OBJECTIVES), value="collage", label="Trained on")
            fresh = gr.Checkbox(False, label="Begin anew", elem_id="mole_train_fresh")
        with gr.Row():
            iterations = gr.Slider(
                label="Iterations",
                minimum=1,
                maximum=2000,
                step=1,
                value=400,
                elem_id="mole_train_iterations",
            )
            every = gr.Slider(
                label="Iterations between previews (0: none)",
                minimum=0,
                maximum=500,
                step=1,
                value=50,
                elem_id="mole_train_every",
            )
        return [objective, fresh, iterations, every]

    def _inspect_page(self) -> None:
        gates = self._gates_picker("mole_inspect_gates")
        show = gr.Button("Inspect", elem_id="mole_inspect_start")
        facts = gr.HTML("", elem_id="mole_inspect_facts")
        last = gr.Button("Gate weights of the last picture")
        weights = gr.HTML("")
        show.click(self.inspect, [gates], [facts], show_progress=False)
        last.click(self.heat_map, [], [weights], show_progress=False)

    def _export_page(self) -> None:
        text = (
            "Freezes the gates at their mean weights over some prompts: one plain LoRA that works everywhere."
        )
        gr.HTML(as_message(text))
        name = gr.Textbox(label="Name of the LoRA", elem_id="mole_export_name")
        gates = self._gates_picker("mole_export_gates")
        model = self._model_picker("mole_export_model")
        prompts = gr.Textbox(label="Prompts like those it will be used for, one a line", lines=2)
        rank = gr.Slider(label="Rank (0: exact)", minimum=0, maximum=256, step=1, value=0)
        with gr.Row():
            start = gr.Button("Export", variant="primary", elem_id="mole_export_start")
            cancel = gr.Button("Cancel")
        status = gr.HTML("", elem_id="mole_export_status")
        log = gr.Textbox(label="Log", lines=8, interactive=False, elem_classes=["mole-log"])
        start.click(self.export, [name, gates, model, prompts, rank], [status, log], show_progress=False)
        cancel.click(lambda: self._stop(EXPORT), [], [status], show_progress=False)

    def _python_page(self) -> None:
        gr.HTML(
            as_message(
                "Training needs newer libraries than this web UI pins, so it runs on a Python of its own: "
                "the one named in Settings > MoLE, or one that is made here, in "
                f"{self._options.environment} (some gigabytes with PyTorch; on Windows with an NVIDIA card "
                "name PyTorch's CUDA index in Settings > MoLE first). Nothing of the web UI's own is changed."
            )
        )
        with gr.Row():
            check = gr.Button("Check", elem_id="mole_python_check")
            make = gr.Button("Make it", elem_id="mole_python_make")
            cancel = gr.Button("Cancel")
        status = gr.HTML("", elem_id="mole_python_status")
        log = gr.Textbox(label="Log", lines=8, interactive=False, elem_classes=["mole-log"])
        check.click(self.check_python, [], [status], show_progress=False)
        make.click(self.make_python, [], [status, log], show_progress=False)
        cancel.click(lambda: self._stop(MAKE), [], [status], show_progress=False)

    def _model_picker(self, elem_id: str) -> Any:
        choices = self._models()
        return gr.Dropdown(
            label="Base model (or: file, folder, hub id)",
            choices=choices,
            value=choices[0],
            allow_custom_value=True,
            elem_id=elem_id,
        )

    def _gates_picker(self, elem_id: str) -> Any:
        gates = gr.Dropdown(
            label="Gates", choices=self._library.gates_files(), allow_custom_value=True, elem_id=elem_id
        )
        # Read when it is opened, so that a training's result is there at once.
        gates.focus(lambda: gr.update(choices=self._library.gates_files()), [], [gates], show_progress=False)
        return gates

    def _models(self) -> list[str]:
        return [*self._checkpoints(), STARTER]

    def refresh(self) -> list[Any]:
        """Read the folders anew."""
        return [gr.update(choices=self._library.experts()), gr.update(choices=self._models())]

    def train(self, *values: Any) -> Iterator[list[Any]]:
        """Start a training and show it until it ends."""
        try:
            self._start_training(*values)
        except (SettingsError, OSError) as error:
            yield [as_message(str(error)), gr.update(), gr.update(), gr.update()]
            return
        yield from self.watch()

    def _start_training(
        self,
        name: str,
        model: str,
        experts: list[str],
        prompts: str,
        concepts: str,
        references: str,
        objective: str,
        fresh: bool,
        iterations: float,
        every: float,
    ) -> None:
        name = check_name(name or "")
        if name in NO_FILE:
            raise SettingsError(f"the name {name!r} is not allowed: it stands for experts without gates")
        if len(experts or ()) < 2:
            raise SettingsError("choose two or more experts")
        folder = self._options.work_folder / name
        command = training_command(
            self._python(),
            model=self._model_file(model),
            experts=distinct([self._library.expert_path(expert) for expert in experts]),
            prompts=lines(prompts, "prompts"),
            concepts=[concept(line) for line in (concepts or "").splitlines() if line.strip()],
            references=(references or "").strip(),
            folder=folder,
            iterations=int(iterations),
            preview_every=int(every),
            objective=objective,
            fresh=bool(fresh),
        )
        target = self._options.gates_folder / f"{name}.safetensors"
        bench.start(TRAIN, lambda: TrainingJob(command, folder, int(iterations), target))

    def watch(self) -> Iterator[list[Any]]:
        """Show the running training until it ends, or how the last one ended."""
        shown = None
        while True:
            job = bench.get(TRAIN)
            if not isinstance(job, TrainingJob):
                yield [as_message("No training yet."), "", gr.update(), ""]
                return
            running = job.running
            picture = job.preview()
            image = gr.update()
            if picture is not None and picture != shown:
                found = opened(picture)
                image, shown = (gr.update() if found is None else found), picture
            losses = [row["loss"] for row in job.history()]
            yield [training_status(job, running), loss_curve(losses), image, job.log()]
            if not running:
                return
            job.wait(_WAIT)

    def cancel(self) -> str:
        """Stop the training; the same settings go on from there."""
        return self._stop(TRAIN)

    def inspect(self, gates: str) -> str:
        """What a gates file is for, in words."""
        from mole_diffusion import MoLEError
        from mole_diffusion.core.inspection import describe_file

        try:
            path = self._library.gates_path(gates or "")
            if path is None:
                return as_message(f"{' and '.join(WITHOUT_GATES)} have no gates file.")
            return described(describe_file(path))
        except (SettingsError, MoLEError) as error:
            return as_message(str(error))

    def heat_map(self) -> str:
        """Gate weights of the last generation."""
        run = self._last_run()
        return gate_map({} if run is None else run.weights, () if run is None else run.experts)

    def export(self, name: str, gates: str, model: str, prompts: str, rank: float) -> Iterator[list[Any]]:
        """Start an export and show it until it ends."""
        from mole_diffusion import MoLEError
        from mole_diffusion.core.shared_gates import is_shared_gates

        try:
            target = self._options.lora_folder / f"{check_name(name or '')}.safetensors"
            path = self._library.gates_path(gates or AUTO)
            if path is None or is_shared_gates(path):
                raise SettingsError("choose gates to freeze, which were trained for some experts")
            command = export_command(
                self._python(),
                model=self._model_file(model),
                experts=[self._library.expert_path(expert) for expert in self._library.experts_of(gates)],
                gates=path,
                prompts=lines(prompts, "prompts"),
                target=target,
                rank=int(rank) or None,
            )
            job = bench.start(EXPORT, lambda: Job(command, self._options.work_folder / "export"))
        except (SettingsError, MoLEError, OSError) as error:
            yield [as_message(str(error)), gr.update()]
            return
        yield from _follow(job, f"Wrote {target}.")

    def check_python(self) -> str:
        """Whether the Python for training is ready."""
        return as_message(environment.describe(self._options.python))

    def make_python(self) -> Iterator[list[Any]]:
        """Make the Python for training, and show that until it ends."""
        import sys

        folder = self._options.environment
        script = str(Path(environment.__file__))
        command = [sys.executable, script, str(folder), str(ROOT), *self._options.pip_options]
        try:
            job = bench.start(MAKE, lambda: Job(command, self._options.work_folder / "environment"))
        except (SettingsError, OSError) as error:
            yield [as_message(str(error)), gr.update()]
            return
        yield from _follow(job, f"Made {folder}.")

    def _python(self) -> Path:
        python = self._options.python
        if not python.is_file():
            raise SettingsError(f"there is no Python at {python}: make one under 'Python for training'")
        return python

    def _model_file(self, model: str) -> str:
        """The file of a checkpoint's title; what else is written stays as it is."""
        if not model or not model.strip():
            raise SettingsError("choose a base model")
        return self._checkpoints().get(model, model.strip())

    @staticmethod
    def _stop(kind: str) -> str:
        job = bench.get(kind)
        if job is None or not job.running:
            return as_message("Nothing is running.")
        job.cancel()
        return as_message("Stopping ...")


def _follow(job: Job, success: str) -> Iterator[list[Any]]:
    while job.running:
        yield [as_message("Working ..."), job.log()]
        job.wait(_WAIT)
    yield [as_message(success if job.succeeded else failure(job)), job.log()]
