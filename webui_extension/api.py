"""Routes for programs: what there is to choose from, and the gate weights of the last picture."""

from __future__ import annotations

from typing import Any

from .session import Session


def add_routes(app: Any, session: Session) -> None:
    """Add GET /mole/v1/experts, /mole/v1/gates and /mole/v1/last-run.

    Args:
        app: the host's FastAPI application.
    """

    @app.get("/mole/v1/experts")  # type: ignore[untyped-decorator]
    def experts() -> dict[str, list[str]]:
        return {"experts": session.library.experts()}

    @app.get("/mole/v1/gates")  # type: ignore[untyped-decorator]
    def gates() -> dict[str, list[str]]:
        return {"gates": session.library.gates()}

    @app.get("/mole/v1/last-run")  # type: ignore[untyped-decorator]
    def last_run() -> dict[str, Any]:
        run = session.last_run
        if run is None:
            return {"experts": [], "weights": {}, "forwards": {}}
        return {"experts": list(run.experts), "weights": run.weights, "forwards": run.forwards}
