"""`mole app`."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from mole_diffusion.app.folder import own_folder
from mole_diffusion.commands.common import DeviceOption, ModelOption, say
from mole_diffusion.commands.diagnosis import OPTIONAL
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.opening import STARTER


def app(
    model: ModelOption = STARTER,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; default: the first free one from 7860 on.")
    ] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Reachable from other machines; default: from this one only.")
    ] = False,
    share: Annotated[
        bool, typer.Option("--share", help="A public address through Gradio's tunnel, for 72 hours.")
    ] = False,
    auth: Annotated[
        str | None, typer.Option(metavar="NAME:PASSWORD", help="What visitors must give to come in.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in a browser.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Compose, train, compare and export in the browser.

    Everything stays on this machine; nothing is fetched unless you name a hub id. Ctrl-C ends it.

    Example: [bold]mole app --browser[/]
    """
    login = _parse_auth(auth)
    with own_folder() as folder:
        try:
            from mole_diffusion.app.interface import AppOptions, serving
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            wanted = next(name for name in OPTIONAL if name.startswith("gradio"))
            raise ConfigError(f'the app needs Gradio: pip install "{wanted}"') from error
        options = AppOptions(
            host="0.0.0.0" if listen else "127.0.0.1",
            port=port,
            share=share,
            auth=login,
            model=model,
            device=device,
            open_browser=browser,
        )
        say("Starting ...")
        with serving(options, folder) as (local, public):
            _wait(local, public, trusted=options.trusted)


def _wait(local: str, public: str | None, *, trusted: bool) -> None:
    """Say where the app is, and return after Ctrl-C or when the system ends it."""
    say(f"The app is at {local}   (Ctrl-C ends it)")
    if public:
        say(f"For everybody, through Gradio's servers: {public}")
    if not trusted:
        say("Open to others without a password: they cannot name paths or hub ids. --auth allows it.")
    # As Ctrl-C, so that the app's folder goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("Ended.")


def _parse_auth(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name or not password:
        raise typer.BadParameter(f"{text!r}; write NAME:PASSWORD", param_hint="--auth")
    return name, password
