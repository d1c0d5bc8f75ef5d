"""The Compose tab: what its controls do."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mole_diffusion.app import browser, fragments, markup, page, regions, show, tiles
from mole_diffusion.app.composing import ComposeRequest, compose
from mole_diffusion.app.jobs import Job
from mole_diffusion.app.metadata import PictureSettings, read_settings
from mole_diffusion.app.session import Picture, Session
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.tabs.compose_layout import ComposeLayout
from mole_diffusion.core.errors import ConfigError, MoLEError

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_QUIET: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
#: What the browser's storage keeps, each with a time of its own.
_KINDS = ("page", "tiles", "regions")
_LIVE: dict[str, Any] = {"concurrency_limit": None, **_QUIET}


@dataclass
class ComposeTab(ComposeLayout):
    """The tab's controls and what they do."""

    studio: Studio

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out and connect it; inside its `gr.Tab`."""
        self.lay_out()
        #: By the names of `page.FIRST`.
        self._controls: dict[str, Any] = {name: getattr(self, name) for name in page.FIRST}
        self._connect(demo)

    def _connect(self, demo: gr.Blocks) -> None:
        controls = list(self._controls.values())
        results = [self.bar, self.picture, self.nla, self.gallery, self.details, self.reuse]
        gr.on(
            [self.go.click, self.prompt.submit],
            self.draw,
            [self.mix, self.canvas, self.image, *controls],
            results,
            **_LIVE,
        )
        self.gallery.change(self.headline, None, self.regions_box, **_QUIET)
        self.cancel.click(self.stop, None, None, **_PRIVATE)
        self.dice.click(lambda: random.randrange(2**32), None, self.seed, **_PRIVATE)
        shown = [self.library, self.mix, self.notice, self.canvas, self.regions_box]
        named = [self.unnamed, self.insert]
        self.beside.input(lambda on: gr.update(visible=on), self.beside, self.nla, **_QUIET)
        self.insert.click(self.insert_phrases, [self.prompt, self.mix], [self.prompt, *named], **_QUIET)
        self.library.select(
            self.choose, [self.library, self.mix, self.prompt], [*shown, self.prompt, *named], **_QUIET
        )
        # What a load brings is lost where the box is opened in the middle of it.
        self.regions_box.expand(self.open_regions, self.canvas, self.canvas, **_QUIET)
        self.over.click(self.paint_over, None, self.canvas, **_QUIET)
        self.clear.click(self.clear_regions, None, [self.canvas, self.regions_box], **_QUIET)
        viewed = [self.picture, self.nla, self.details, self.reuse]
        self.gallery.select(self.select, None, viewed, **_QUIET)
        filled = [*controls, *shown, *named, self.image]
        self.reuse.click(self.use_shown, None, filled, **_QUIET)
        self.dropped.upload(self.use_dropped, self.dropped, [*filled, self.dropped], **_QUIET)
        self._connect_keeping(controls, named)
        demo.load(
            self.restore,
            self.brought,
            [*filled, self.gallery, self.mark],
            js=browser.read_js(_KINDS),
            **_QUIET,
        )
        demo.load(self.rejoin, None, results, **_LIVE)
        self.refreshed = (
            self.refresh,
            [self.library, self.mix, self.prompt, self.mark],
            [*shown, self.gallery, self.prompt, *named, self.guidance, self.mark],
        )

    def _connect_keeping(self, controls: list[Any], named: list[Any]) -> None:
        """Every change goes into the browser's storage at once, and to the server when it can take it."""
        # Each by itself: while a load fills the page part by part, controls change beside tiles of before.
        changes = [control.change for control in controls]
        painted, chosen = [self.canvas.input], [self.mix.select]
        for events, kind, inputs, names, handler, outputs in (
            (changes, "page", [*controls, self.mix], list(self._controls), self.remember, named),
            (chosen, "tiles", [self.mix, self.prompt], ["tiles"], self.remember_tiles, named),
            (painted, "regions", [self.canvas], ["regions"], self.keep_regions, [self.regions_box]),
        ):
            gr.on(events, None, [self.mark, *inputs], None, js=browser.write_js(kind, names), **_PRIVATE)
            gr.on(
                events,
                handler,
                [self.stamp, *inputs],
                outputs,
                js=browser.STAMPED,
                trigger_mode="always_last",
                **_QUIET,
            )
        # Not `input`: after a load that brings the picture which was taken away.
        self.image.change(self.begin_from, self.image, None, trigger_mode="always_last", **_QUIET)

    @show.friendly
    def refresh(self, library: Any, values: Any, written: str, mark: str, request: gr.Request) -> list[Any]:
        """What the session has, after work in other tabs: tiles, notices, brush colours, gallery, prompt."""
        if not mark:  # the page is loading, and this tab is shown first: `restore` fills it, in any order
            return [gr.skip()] * len(self.refreshed[2])
        session = show.session_of(self.studio, request)
        prompt = str(page.controls(session)["prompt"])
        there, mix, *rest = self._experts(session, values)
        there, mix, fresh = show.news([there, mix, prompt], [library, values, written])
        return [
            *(there, mix, *rest, fragments.gallery(session), fresh),
            *_named(session, prompt, values),
            page.controls(session)["guidance"],
            browser.mark_of(session),
        ]

    @show.friendly
    def restore(self, brought: Any, request: gr.Request) -> list[Any]:
        """After a load: everything as it was, with what the browser has and could not tell any more."""
        session = show.session_of(self.studio, request)
        held, chosen, painted = (
            browser.newer(session, kind, index, brought) for index, kind in enumerate(_KINDS)
        )
        page.take(session, held)
        with suppress(MoLEError):
            if chosen:
                session.set_page(tiles=tiles.read(chosen.get("tiles")))
        with suppress(MoLEError):
            if painted:
                session.set_page(regions=regions.kept(painted.get("regions")))
        kept = page.controls(session)
        filled = self._filled(session, kept, session.page.get("tiles"))
        return [*filled, fragments.gallery(session), browser.mark_of(session)]

    @show.friendly
    def remember(self, request: gr.Request, stamp: Any, *values: Any) -> list[Any]:
        """Keep what the controls hold, and say what the prompt does not name of the tiles, the last value."""
        session = show.session_of(self.studio, request)
        *told, mix = values
        held = dict(zip(self._controls, told, strict=True))
        page.take(session, held, stamps=browser.stamps(session, "page", stamp))
        prompt = str(held["prompt"] or "")
        return _named(session, prompt, mix)

    @show.friendly
    def remember_tiles(self, request: gr.Request, stamp: Any, mix: Any, prompt: str) -> list[Any]:
        """Keep which experts count, and say what the prompt does not name."""
        session = show.session_of(self.studio, request)
        session.set_page(tiles=tiles.read(mix), stamps=browser.stamps(session, "tiles", stamp))
        return _named(session, prompt or "", mix)

    @show.friendly
    def keep_regions(self, stamp: Any, painted: Any, request: gr.Request) -> Any:
        """Keep what was painted, whether it is drawn with or not."""
        session = show.session_of(self.studio, request)
        texts = regions.kept(painted, session.page.get("regions"))
        session.set_page(regions=texts, stamps=browser.stamps(session, "regions", stamp))
        return _heading(session)

    @show.friendly
    def open_regions(self, painted: Any, request: gr.Request) -> Any:
        """The sheet with its experts, and with what is kept where nothing is on it."""
        session = show.session_of(self.studio, request)
        found = regions.around(session, page.ground(session))
        return found if painted else {**found, "value": regions.painted(session.page.get("regions"))}

    @show.friendly
    def begin_from(self, image: Any, request: gr.Request) -> None:
        """Keep the picture that new ones begin from."""
        page.begin_from(show.session_of(self.studio, request), image)

    @show.friendly
    def insert_phrases(self, prompt: str, mix: Any, request: gr.Request) -> list[Any]:
        """Write the phrases of experts that the prompt does not name."""
        session = show.session_of(self.studio, request)
        missing = page.missing_phrases(session, prompt or "", tiles.active(tiles.read(mix)))
        written = page.with_phrases(prompt or "", list(missing.values())) if missing else prompt
        session.set_page(prompt=written)
        return [written, *_named(session, written, mix)]

    @show.friendly
    def choose(self, library: Any, values: Any, prompt: str, request: gr.Request) -> list[Any]:
        """Other experts, and the prompt that names them."""
        session = show.session_of(self.studio, request)
        with show.warned():
            prompt = page.choose(session, tiles.active(tiles.read(library)), prompt or "")
        return [*self._experts(session, values), prompt, *_named(session, prompt, None)]

    @show.friendly
    async def draw(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        """Queue pictures and show how they come along."""
        session = show.session_of(self.studio, request)
        mix, canvas, image, *rest = values
        held = dict(zip(self._controls, rest, strict=True))
        painted = regions.kept(canvas, session.page.get("regions"))
        wanted = self._request(session, held, mix, painted, image)
        beside = held["beside"] and wanted.mixture != "nla"
        page.take(session, held, tiles=tiles.read(mix), regions=painted)
        work = compose(self.studio, session, wanted, [wanted.mixture, *(["nla"] if beside else [])])
        job = self.studio.submit(session, "compose", work)
        async for update in self._follow(session, job):
            yield update

    async def rejoin(self, request: gr.Request) -> AsyncIterator[Any]:
        """After a reload: show the drawing that is under way, or the picture that was shown."""
        session = show.session_of(self.studio, request)
        if job := session.running("compose"):
            async for update in self._follow(session, job):
                yield update
        else:
            yield self._results(session, show.progress_bar(None))

    def headline(self, request: gr.Request) -> Any:
        """The heading of the regions, which says for whom there are some."""
        session = show.session_of(self.studio, request)
        return _heading(session)

    def stop(self, request: gr.Request) -> None:
        """Cancel the drawing."""
        show.session_of(self.studio, request).cancel("compose")

    @show.friendly
    def paint_over(self, request: gr.Request) -> Any:
        """The picture that is shown below what is painted."""
        session = show.session_of(self.studio, request)
        shown = page.shown_pictures(session)
        if not shown:
            gr.Info("There is no picture yet: draw one first.")
            return gr.skip()
        session.set_page(ground=shown[0].path.name)
        return regions.around(session, shown[0].path)

    def clear_regions(self, request: gr.Request) -> list[Any]:
        """No regions, here and in what is kept."""
        session = show.session_of(self.studio, request)
        session.set_page(regions={}, ground="")
        return [{**regions.around(session, None), "value": []}, _heading(session)]

    def select(self, event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        """A picture of the gallery, large and with its settings."""
        session = show.session_of(self.studio, request)
        if not 0 <= event.index < len(session.pictures):
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        page.show_pictures(session, [session.pictures[event.index]])
        return self._viewed(session)

    @show.friendly
    def use_shown(self, request: gr.Request) -> list[Any]:
        """The settings of the picture that is shown into the controls."""
        session = show.session_of(self.studio, request)
        shown = page.shown_pictures(session)
        if not shown:
            raise ConfigError("there is no picture yet: draw one first")
        return self._fill(session, shown[0].settings)

    @show.friendly
    def use_dropped(self, path: str | None, request: gr.Request) -> list[Any]:
        """The settings of a picture that was dropped into the controls."""
        session = show.session_of(self.studio, request)
        filled = [gr.skip()] * (len(self._controls) + 8)
        if path is not None:
            with show.warned():
                filled = self._fill(session, read_settings(path))
        return [*filled, None]

    def _request(
        self, session: Session, held: dict[str, Any], mix: Any, painted: dict[str, str], image: Any
    ) -> ComposeRequest:
        tiles_shown = tiles.read(mix)
        seed = int(held["seed"] or 0)
        return ComposeRequest(
            prompt=held["prompt"] or "",
            negative=held["negative"] or "",
            mixture=held["mixture"] or "gates",
            seed=random.randrange(2**32) if seed == -1 else seed,
            steps=int(held["steps"]),
            guidance=float(held["guidance"]),
            width=int(held["width"] or 0),
            height=int(held["height"] or 0),
            active=tiles.active(tiles_shown),
            strengths={tile["name"]: tile["strength"] for tile in tiles_shown},
            regions=regions.masks_of(session, painted),
            count=int(held["count"] or 1),
            sampler=held["sampler"] or "",
            image=image,
            denoising=float(held["denoising"] or 0.6),
        )

    async def _follow(self, session: Session, job: Job) -> AsyncIterator[Any]:
        preview, rest = None, [gr.skip()] * 4
        async for bar in show.watch(self.studio, job):
            fresh = job.preview if job.preview is not preview and not job.finished else None
            preview = job.preview
            yield bar, gr.skip() if fresh is None else fresh, *rest
        if job.state == "done":
            drawn: list[Picture] = job.result
            page.show_pictures(session, drawn[:2] if _pair(drawn) else drawn[-1:])
            yield self._results(session, show.progress_bar(None))
        else:
            yield self._results(session, show.progress_bar(job))
        show.raise_if_failed(job)

    def _results(self, session: Session, bar: Any) -> tuple[Any, ...]:
        picture, nla, details, reuse = self._viewed(session)
        return bar, picture, nla, fragments.gallery(session), details, reuse

    def _viewed(self, session: Session) -> tuple[Any, Any, Any, Any]:
        """The picture that is shown, the one beside it, its facts, and whether they can be used again."""
        shown = page.shown_pictures(session)
        if not shown:
            return None, gr.skip(), "", gr.update(interactive=False)
        nla = str(shown[1].path) if len(shown) > 1 else None
        beside = gr.update(value=nla, visible=bool(page.controls(session)["beside"]))
        facts = fragments.facts(shown[0].settings)
        return str(shown[0].path), beside, facts, gr.update(interactive=True)

    def _experts(self, session: Session, values: Any) -> list[Any]:
        return [
            tiles.library_tiles(session),
            tiles.mixing_tiles(session, values),
            fragments.notice(session),
            regions.around(session, page.ground(session)),
            _heading(session),
        ]

    def _filled(self, session: Session, kept: dict[str, Any], values: Any) -> list[Any]:
        """Values for all controls, experts and regions, and the picture to begin from."""
        *experts, canvas, heading = self._experts(session, values)
        begin = page.begun_from(session)
        return [
            *(kept[name] for name in self._controls),
            *experts,
            {**canvas, "value": regions.painted(session.page.get("regions"))},
            heading,
            *_named(session, str(kept["prompt"]), values),
            None if begin is None else str(begin),
        ]

    def _fill(self, session: Session, settings: PictureSettings) -> list[Any]:
        """What a picture was drawn with, into the session and the controls."""
        missing = [use.name for use in settings.experts if use.name not in session.library]
        if settings.model != session.model:
            gr.Warning(markup.html("That picture was drawn with another model: {}.", settings.model))
        if missing:
            gr.Warning(markup.html("Not in your library: {}. Upload them in Models.", ", ".join(missing)))
        session.choose([use.name for use in settings.experts if use.name in session.library])
        values = [
            {"name": use.name, "on": use.active, "strength": min(max(use.strength, 0.0), tiles.MAX_STRENGTH)}
            for use in settings.experts
            if use.name in session.chosen
        ]
        known = {name: getattr(settings, name) for name in page.FIRST if hasattr(settings, name)}
        known |= {} if settings.image_sha256 else {"denoising": page.FIRST["denoising"]}
        session.set_page(**known, count=1, tiles=values, regions=dict(settings.regions))
        _begin_as(session, settings)
        return self._filled(session, page.controls(session), values)


def _begin_as(session: Session, settings: PictureSettings) -> None:
    """Keep the picture to begin from only where these settings were drawn from it."""
    if page.begun_digest(session) == settings.image_sha256:
        return
    page.begin_from(session, None)
    if settings.image_sha256:
        gr.Warning("That picture was begun from a picture that is not here: give it again.")


def _pair(pictures: list[Picture]) -> bool:
    """Whether the first two are of one seed."""
    return len(pictures) > 1 and pictures[0].settings.seed == pictures[1].settings.seed


def _heading(session: Session) -> Any:
    """The heading of the regions: for whom there are some that count."""
    return gr.update(label=regions.title(list(regions.masks_of(session, session.page.get("regions")))))


def _named(session: Session, prompt: str, mix: Any) -> list[Any]:
    """What the prompt does not name, and whether there is something to insert."""
    shown = tiles.read(mix)
    active = tiles.active(shown) if shown else None
    missing = page.missing_phrases(session, prompt, active)
    return [fragments.not_named(missing), gr.update(visible=bool(missing))]
