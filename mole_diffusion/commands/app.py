"""`mole app`."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.app.folder import own_folder
from mole_diffusion.commands.common import DeviceOption, ModelOption, say
from mole_diffusion.commands.diagnosis import need_extra
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import check_writable
from mole_diffusion.starter.location import STARTER

_AUTH_VARIABLE = "MOLE_APP_AUTH"


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
        str | None,
        typer.Option(
            metavar="NAME:PASSWORD",
            envvar=_AUTH_VARIABLE,
            show_envvar=True,
            help="What visitors must give to come in. Other users of this machine see options of programs;"
            " they do not see the variable or --auth-file.",
        ),
    ] = None,
    auth_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="As --auth: a file whose first line is NAME:PASSWORD.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that visitors may call this machine by; again for more."),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in a browser.")] = False,
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder where pictures, gates, exports and trainings stay."),
    ] = Path("outputs/app"),
    device: DeviceOption = "auto",
) -> None:
    """Compose, train, compare and export in the browser.

    Everything stays on this machine; nothing is fetched unless you name a hub id. Ctrl-C ends it; what
    was made stays in --out, and the next start goes on with it.

    Example: [bold]mole app --browser[/]
    """
    login = _parse_auth(auth) if auth_file is None else _read_auth(auth_file)
    host = "0.0.0.0" if listen else "127.0.0.1"
    if port is not None:
        _check_port(host, port)
    need_extra("app", "the app")
    check_writable(out)
    with own_folder():
        from mole_diffusion.app.interface import AppOptions, serving

        options = AppOptions(
            host=host,
            port=port,
            share=share,
            auth=login,
            hosts=tuple(allow_host or ()),
            model=model,
            device=device,
            open_browser=browser,
            outputs=out,
        )
        if login is None and (listen or share):
            say(_opened(listen, share))
        say("Starting ...")
        with serving(options) as (local, public):
            _wait(local, public)
    made = sum(path.is_file() for path in out.rglob("*"))
    say(f"Ended. What was made is in {out}." if made else "Ended. Nothing was made.")


def _opened(listen: bool, share: bool) -> str:
    """What the app opens without a password."""
    who = "everybody who learns its address" if share else "everybody in this machine's networks"
    names = " The machine's name and addresses work; --allow-host adds a name." if listen else ""
    return (
        f"Open to {who}, without a password: they can draw, train and upload files here, on this machine's"
        " time and disk. They do not see your pictures, and cannot name files of this machine or hub ids."
        f" {_AUTH_VARIABLE}=NAME:PASSWORD, --auth-file or --auth asks for a password.{names}"
    )


def _wait(local: str, public: str | None) -> None:
    """Say where the app is, and return after Ctrl-C or when the system ends it."""
    if public:
        say(f"For everybody, through Gradio's servers: {public}")
    say(f"The app is at {local}   (Ctrl-C ends it)")
    # As Ctrl-C, so that uploads go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    say("Ending ...")


def _check_port(host: str, port: int) -> None:
    """Say at once that a port is taken, before anything is loaded.

    Raises:
        ConfigError: nothing can listen there.
    """
    with socket.socket() as place:
        if os.name == "posix":  # as servers do: a port that was left a moment ago is free
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((host, port))
            place.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} is taken by another program: choose another --port, or leave it out"
                ) from error
            raise ConfigError(f"port {port} cannot be used: {error.strerror}") from error


def _parse_auth(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name or not password:
        # Not the text itself: it may be most of a password.
        raise typer.BadParameter("it has no NAME:PASSWORD; write both, with a colon", param_hint="--auth")
    return name, password


def _read_auth(path: Path) -> tuple[str, str]:
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}", param_hint="--auth-file") from error
    found = _parse_auth(line or None)
    if found is None:
        raise typer.BadParameter(f"{path} has no NAME:PASSWORD in its first line", param_hint="--auth-file")
    return found
