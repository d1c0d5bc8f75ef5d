"""The page: head and tabs; and the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from anyio import CapacityLimiter
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from mole_diffusion.app import api
from mole_diffusion.app.doors import CallGuard, HostGuard, Hosts, LoginGuard
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.tabs.compare import CompareTab
from mole_diffusion.app.tabs.compose import ComposeTab
from mole_diffusion.app.tabs.export import ExportTab
from mole_diffusion.app.tabs.inspect import InspectTab
from mole_diffusion.app.tabs.models import ModelsTab
from mole_diffusion.app.tabs.train import TrainTab
from mole_diffusion.app.theme import STYLE, theme
from mole_diffusion.app.uploads import MAX_FILE_BYTES
from mole_diffusion.app.web import SessionCookie, UploadGuard
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import check_writable
from mole_diffusion.starter.location import STARTER, starter_dir

#: Calls that are open at once: whoever waits for a picture is one, and holds no thread. The long work has a
#: queue of its own.
_MAX_REQUESTS = 1024
#: Threads for the short work of pages: reading what was sent, answering at once.
_THREADS = 16
_HOUR = 3600
#: Where what was made stays, unless another folder is named.
OUTPUTS = Path("outputs") / "app"

#: Ctrl+Enter draws, wherever the keys are. A hidden overflow would make the page a scroll area of its own, in
#: which nothing can stay in sight.
_PAGE = """() => {
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    const button = document.querySelector('#draw');
    if (button && button.offsetParent !== null) { event.preventDefault(); button.click(); }
  });
  document.querySelector('.gradio-container').style.setProperty('overflow', 'clip', 'important');
}"""
_HEAD = """
<div class="masthead">
<svg viewBox="0 0 48 48" aria-hidden="true"><rect width="48" height="48" rx="13" fill="#e4572e"/>
<circle cx="16" cy="18" r="6.5" fill="#fff"/><circle cx="32" cy="18" r="6.5" fill="#fff" opacity=".72"/>
<circle cx="24" cy="33" r="6.5" fill="#fff" opacity=".45"/></svg>
<div><h1>Mixture of LoRA Experts</h1><p>Several LoRAs in one picture, each in its place.</p></div>
</div>
"""


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """How the app is served.

    Attributes:
        host, port: where it listens; port None takes the first free one from 7860 on.
        share: a public address through Gradio's tunnel.
        auth: (name, password) that visitors must give.
        hosts: names that the machine goes by, beside its own.
        model: the base model new sessions start with.
        device: "auto" or a device.
        open_browser: show it in a browser.
        outputs: where pictures, gates, exports and trainings are written and stay.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    auth: tuple[str, str] | None = None
    hosts: tuple[str, ...] = ()
    model: str = STARTER
    device: str = "auto"
    open_browser: bool = False
    outputs: Path = OUTPUTS

    @property
    def trusted(self) -> bool:
        """Whether whoever comes may name paths and hub ids: from this machine, or with the password."""
        return self.auth is not None or (self.host in ("127.0.0.1", "localhost", "::1") and not self.share)


def build(studio: Studio) -> gr.Blocks:
    """The page for a studio."""
    with gr.Blocks(
        title="Mixture of LoRA Experts",
        analytics_enabled=False,
        delete_cache=(_HOUR, 6 * _HOUR),
        fill_width=True,
    ) as demo:
        # First, so that its names are not taken by the handlers of the tabs.
        api.connect(studio)
        gr.HTML(_HEAD, apply_default_css=False)
        with gr.Tabs():
            for name, tab in _tabs(studio):
                with gr.Tab(name, id=name.lower()) as shown:
                    tab.build(demo)
                handler, inputs, outputs = tab.refreshed
                shown.select(handler, inputs, outputs, show_progress="hidden", api_visibility="private")
    demo.queue(max_size=_MAX_REQUESTS, default_concurrency_limit=None)
    return demo


def _tabs(studio: Studio) -> list[tuple[str, Any]]:
    return [
        ("Compose", ComposeTab(studio)),
        ("Train", TrainTab(studio)),
        ("Inspect", InspectTab(studio)),
        ("Compare", CompareTab(studio)),
        ("Export", ExportTab(studio)),
        ("Models", ModelsTab(studio)),
    ]


@contextmanager
def serving(options: AppOptions) -> Iterator[tuple[str, str | None]]:
    """Serve the app inside the `with` block, the last thing a process does; inside `own_folder`.

    Args:
        options: how.

    Yields:
        The local address and the public one, if there is one.

    Raises:
        ConfigError: the device, the model or the port cannot be had.
        WriteError: nothing can be written where the outputs are to stay.
    """
    check_writable(options.outputs)
    hosts = Hosts(options.host, options.hosts)
    with ExitStack() as stack:
        studio = _studio(options)
        stack.callback(studio.close, ending=True)
        demo = build(studio)
        try:
            _, local, public = demo.launch(**_launch_options(options, hosts))
        except OSError as error:
            raise ConfigError(f"the app cannot listen on {options.host}: {error}") from error
        if public:
            hosts.names.add(urlsplit(public).hostname or "")
        # Gradio would take as many as there may be open calls.
        demo.limiter = CapacityLimiter(_THREADS)
        try:
            yield local, public
        finally:
            demo.close(verbose=False)


def _studio(options: AppOptions) -> Studio:
    """The models; a base other than the starter is opened before anybody waits for a page."""
    studio = Studio(
        options.outputs.resolve(), model=options.model, device=options.device, trusted=options.trusted
    )
    error = studio.opening.wait().error if options.model != STARTER else None
    if error is not None:
        studio.close()
        raise error
    return studio


def _launch_options(options: AppOptions, hosts: Hosts) -> dict[str, Any]:
    """Nothing is sent anywhere: no analytics, no history of runs, no link to a hub."""
    guards = [
        Middleware(HostGuard, hosts=hosts),
        Middleware(LoginGuard),
        Middleware(SessionCookie),
        Middleware(CallGuard),
        Middleware(UploadGuard, folder=Path(get_upload_folder())),
    ]
    return {
        "server_name": options.host,
        "server_port": options.port,
        "share": options.share,
        "auth": options.auth,
        "inbrowser": options.open_browser,
        "prevent_thread_lock": True,
        "quiet": True,
        "max_threads": _MAX_REQUESTS,
        "show_error": True,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "pwa": False,
        "ssr_mode": False,
        "mcp_server": False,
        "max_file_size": MAX_FILE_BYTES,
        # Folders of visitors have names that nobody else can know.
        "allowed_paths": [str(starter_dir() / "experts"), str(options.outputs.resolve())],
        "theme": theme(),
        "css_paths": [STYLE],
        "js": _PAGE,
        "app_kwargs": {
            "middleware": guards,
            "docs_url": None,
            "redoc_url": None,
        },
    }
