"""Bringing LoRAs and gates into a session."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import ExpertCard, Gates
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.uploads import check_upload
from mole_diffusion.core.bases import base_of_expert, check_prediction
from mole_diffusion.core.checkpoint import read_gates_header
from mole_diffusion.core.errors import ConfigError, ExpertLoadError, GateMismatchError
from mole_diffusion.core.experts import Expert, load_expert
from mole_diffusion.core.peft_folder import expert_paths
from mole_diffusion.core.phrases import STYLE, without_article
from mole_diffusion.core.shared_gates import SharedGates, is_shared_gates
from mole_diffusion.pictures.training.concepts import concepts_from_experts
from mole_diffusion.sources import find_expert_file

MAX_OWN = 40
_NAME = re.compile(r"[^\w .+-]+")


def add_file(studio: Studio, session: Session, path: Path, name: str = "") -> ExpertCard:
    """A LoRA file as one more expert of the session; the file is copied into the session's folder.

    Raises:
        ConfigError: no safetensors file, too many experts, or another base model is being opened.
        ExpertLoadError: no LoRA, or for another base model.
    """
    if check_upload(path) != "safetensors":
        raise ConfigError(f"{path.name!r} is no safetensors file")
    return _add(studio, session, path, name or path.stem)


def _add(studio: Studio, session: Session, path: Path, name: str) -> ExpertCard:
    """A LoRA file, or a folder with one, as one more expert of the session."""
    session.check_settled()
    if sum(card.own for card in session.library.values()) >= MAX_OWN:
        raise ConfigError(f"{MAX_OWN} own experts are in the library already; remove some first")
    expert = load_expert(path, name=name)
    check_base(studio, session, expert)
    files = expert_paths(path)
    alone = len(files) == 1 and path.suffix == ".safetensors"
    kept = session.new_path("experts", ".safetensors" if alone else "")
    for own_name, file in files.items():
        target = kept if alone else kept / own_name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    card = _card(expert, kept, _free_name(session, name))
    session.add(card)
    return card


def add_made(
    session: Session, path: Path, name: str, text: str, class_text: str, references: tuple[Path, ...]
) -> ExpertCard:
    """An expert that was trained here, and lies in the session's folder already.

    Args:
        session: whose.
        path: the LoRA.
        name: wanted; empty takes the words of the text.
        text, class_text: what it knows, with its trigger and without.
        references: the pictures it was trained on.
    """
    wanted = name.strip() or "-".join(without_article(text).split())
    card = ExpertCard(
        name=_free_name(session, wanted),
        path=path,
        text=text,
        class_text=class_text,
        picture=references[0] if references else None,
        references=references,
        own=True,
    )
    session.add(card)
    return card


def add_source(studio: Studio, session: Session, source: str, name: str = "") -> ExpertCard:
    """A LoRA by path, folder or hub id.

    Raises:
        ConfigError: users may not name sources here.
        ExpertLoadError: nothing is there, or no LoRA for this base.
    """
    path, own_name = find_expert_file(studio.check_source(source))
    return _add(studio, session, path, name.strip() or own_name)


def add_gates(session: Session, path: Path) -> tuple[str, ...]:
    """Trained gates for experts of the session, which are chosen then; or shared gates, for any.

    Returns:
        The experts' names; none of shared gates.

    Raises:
        ConfigError: no safetensors file, or another base model is being opened.
        GateMismatchError: no gates file, or for experts that are not in the library.
    """
    session.check_settled()
    if check_upload(path) != "safetensors":
        raise ConfigError(f"{path.name!r} is no safetensors file")
    if is_shared_gates(path):
        SharedGates.load(path)
        session.set_shared(Gates(session.keep_file(path, "gates")))
        return ()
    header = read_gates_header(path)
    names = tuple(dict.fromkeys(name for part in header.parts for name in header.expert_names(part)))
    missing = [name for name in names if name not in session.library]
    if missing:
        raise GateMismatchError(
            f"these gates are for {', '.join(names)}; not in your library: {', '.join(missing)}."
            " Add those LoRAs first, under the same names"
        )
    kept = Gates.of_file(session.keep_file(path, "gates"))
    session.choose(names)
    session.set_gates(session.cards, kept)
    return names


def check_base(studio: Studio, session: Session, expert: Expert) -> None:
    """Refuse an expert for another kind of base model, as far as that can be told without the network.

    Raises:
        ExpertLoadError: names both bases.
    """
    facts = studio.facts(session.model)
    if facts is None:
        return
    theirs = base_of_expert(expert)
    if theirs.width is not None and facts["width"] is not None and theirs.width != facts["width"]:
        raise ExpertLoadError(f"{expert.name!r} was made for {theirs}; the open model is {facts['base']}")
    if facts["prediction"]:
        check_prediction(expert, facts["prediction"])


def _card(expert: Expert, path: Path, name: str) -> ExpertCard:
    """What the file says about itself."""
    texts: dict[str, Any] = {}
    if expert.triggers:
        concept = concepts_from_experts({name: expert})[name]
        texts = {"text": concept.text, "class_text": concept.class_text}
        texts["kind"] = "style" if concept.kind == STYLE else "concept"
    return ExpertCard(name=name, path=path, own=True, **texts)


def _free_name(session: Session, wanted: str) -> str:
    """The name without odd characters, numbered where it is taken."""
    base = _NAME.sub(" ", wanted).strip()[:40] or "expert"
    name, number = base, 2
    while name in session.library:
        name, number = f"{base} {number}", number + 1
    return name
