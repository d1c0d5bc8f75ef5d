"""The script that the web UI loads: it passes the host's callbacks on and does nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modules import paths, prompt_parser, script_callbacks, scripts, sd_models, shared, ui_components

PACKAGE = "mole_webui"


def _load_package() -> None:
    """Make the extension importable under a name of its own; `ui` and `host` could be anybody's."""
    if PACKAGE in sys.modules:
        return
    folder = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None  # as the file is there
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


_load_package()

from mole_webui import api, options, xyz  # noqa: E402
from mole_webui.library import Library  # noqa: E402
from mole_webui.session import Session  # noqa: E402
from mole_webui.settings import INFOTEXT_KEYS  # noqa: E402

_settings = options.Options(shared.opts, shared.cmd_opts, paths.models_path, paths.data_path)
_library = Library(_settings.lora_folder, _settings.gates_folder)


def _texts(prompts: list[str], *steps: int) -> list[list[list[str]]]:
    """What prompts become: the parts between AND, each as the texts that prompt editing makes of it."""
    indexes, parts, _ = prompt_parser.get_multicond_prompt_list(prompts)
    schedules = prompt_parser.get_learned_conditioning_prompt_schedules(parts, *steps)
    texts = [list(dict.fromkeys(text for _, text in schedule)) for schedule in schedules]
    return [[texts[index] for index, _ in prompt] for prompt in indexes]


def _passes(p: Any) -> list[list[list[list[str]]]]:
    """The texts of a batch, for each pass."""
    prompts = list(getattr(p, "prompts", None) or p.all_prompts)
    passes = [_texts(prompts, p.steps)]
    if getattr(p, "enable_hr", False):
        more = getattr(p, "hr_second_pass_steps", 0) or p.steps
        passes.append(_texts(list(getattr(p, "hr_prompts", None) or prompts), p.steps, more))
    return passes


_session = Session(_library, shared.opts, lambda: shared.sd_model, _passes)
_widgets = SimpleNamespace(InputAccordion=ui_components.InputAccordion, ToolButton=ui_components.ToolButton)


class MoLEScript(scripts.Script):  # type: ignore[misc]
    """Experts, gates and regions in txt2img and img2img."""

    def title(self) -> str:
        """Name in the API: "mole"."""
        return "MoLE"

    def show(self, is_img2img: bool) -> Any:
        """In both tabs, always."""
        return scripts.AlwaysVisible

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """The host has made a component; the prompt comes before the panel."""
        if kwargs.get("elem_id") == ("img2img_prompt" if self.is_img2img else "txt2img_prompt"):
            self.prompt = component

    def ui(self, is_img2img: bool) -> list[Any]:
        """Build the panel; hosts call this more than once."""
        from mole_webui.ui import Panel

        panel = Panel(
            _library,
            lambda: _session.last_run,
            _settings.rows,
            self.elem_id,
            _widgets,
            getattr(self, "prompt", None),
        )
        self.infotext_fields = panel.infotext_fields
        self.paste_field_names = list(INFOTEXT_KEYS)
        controls: list[Any] = panel.controls
        return controls

    def process(self, p: Any, *args: Any) -> None:
        """Before anything is drawn."""
        _session.process(p, args)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Before the prompts of a batch are encoded."""
        _session.process_batch(p, args)

    def before_hr(self, p: Any, *args: Any) -> None:
        """Before the second pass, whose checkpoint may be another."""
        _session.draw_on(p)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Before each pass, on hosts that say so."""
        _session.follow()

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """After the last batch."""
        _session.postprocess(p)


def _checkpoints() -> dict[str, str]:
    """Title -> file, the current one first."""
    found = {info.title: info.filename for info in sd_models.checkpoints_list.values()}
    # Not `shared.sd_model`, which would load it while the page is built.
    current = getattr(shared.opts, "sd_model_checkpoint", None)
    return dict(sorted(found.items(), key=lambda item: item[0] != current))


def _add_tab() -> list[tuple[Any, str, str]]:
    from mole_webui.training_tab import TrainingTab

    tab = TrainingTab(_library, _settings, _checkpoints, lambda: _session.last_run)
    return [(tab.build(), "MoLE", "mole_tab")]


# No `name=`: some hosts' functions do not take it.
script_callbacks.on_before_ui(lambda: xyz.add_axes(scripts.scripts_data, _session))
script_callbacks.on_ui_tabs(_add_tab)
script_callbacks.on_ui_settings(lambda: options.add_to(shared.opts, shared.OptionInfo))
script_callbacks.on_app_started(lambda demo, app: api.add_routes(app, _session))
script_callbacks.on_model_loaded(_session.follow)
script_callbacks.on_cfg_denoiser(lambda params: _session.follow())
script_callbacks.on_script_unloaded(_session.clear)
