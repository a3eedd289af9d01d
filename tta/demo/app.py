"""The HTTP side of the demo: one page, its state, and its buttons."""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from html import escape
from importlib import resources
from string import Template
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict
from torch import nn

from tta import config, methods
from tta.demo.pictures import OFFERED, SEVERITIES, Pictures
from tta.demo.player import Player, View
from tta.demo.settings import DemoSettings

KINDS = {"page.css": "text/css", "page.js": "text/javascript"}
# Nothing of any other host: the browser itself refuses what the page should ask for by mistake.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Wanted(BaseModel):
    """A change that a button asks for; what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    corruption: str | None = None
    severity: int | None = None
    method: str | None = None
    playing: bool | None = None


def create_app(
    model: nn.Module,
    pictures: Pictures,
    settings: DemoSettings | None = None,
    *,
    method: str | None = None,
    source: Any = None,
    hparams: Mapping[str, Any] | None = None,
) -> FastAPI:
    """An ASGI application with the page. All who look on see one stream, and one thread learns.

    Args:
        model: images (batch, 3, height, width) in [0, 1] -> logits; it is not changed.
        pictures: :func:`tta.demo.of_digits`, :func:`tta.demo.of_folder`, or of a domain of your own.
        settings: see :class:`DemoSettings`.
        method: to begin with; left out, ``auto``.
        source: source images or statistics, for the methods that need some, as in :func:`tta.adapt`.
        hparams: hyper-parameters of ``method``; others have their own defaults.

    Raises:
        ValueError: a model, method or setting that does not fit.

    Example:
        >>> import tta
        >>> from tta.demo import create_app, of_digits
        >>> app = create_app(tta.load_model("digits-cnn"), of_digits())  # uvicorn.run(app)
    """
    settings = settings or DemoSettings()
    player = Player(model, pictures, settings, method=method or methods.DEFAULT, source=source, hparams=hparams)
    page = _page(f"{pictures.title} on {getattr(model, 'spec', type(model).__name__)}", player.method)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        player.start()
        yield
        player.stop()

    # Without FastAPI's pages about itself, which ask a public host for their scripts.
    app = FastAPI(title="tta demo", lifespan=lifespan, openapi_url=None)
    app.state.player = player
    if settings.host in ("127.0.0.1", "localhost"):  # then no other name in the address bar can be right
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app.add_exception_handler(RequestValidationError, _invalid)

    @app.get("/", response_class=HTMLResponse)
    def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/{name}")
    def file(name: str) -> Response:
        if name not in KINDS:
            raise HTTPException(404, f"There is no '{name}' here.")
        return Response(_read(name), media_type=KINDS[name])

    _add_buttons(app, player)
    return app


def _add_buttons(app: FastAPI, player: Player) -> None:
    @app.get("/api/state")
    def state(seen: int = -1) -> Response:
        """The present view; 204 where ``seen`` is its version."""
        view = player.view
        return Response(status_code=204) if view.version == seen else _answer(view)

    @app.post("/api/change", dependencies=[Depends(_of_this_page)])
    def change(wanted: Wanted) -> Response:
        """Change the corruption, the severity, the method, or whether it plays."""
        try:
            return _answer(player.change(**wanted.model_dump()))
        except (ValueError, TypeError, ModuleNotFoundError) as error:
            raise HTTPException(422, str(error)) from None

    @app.post("/api/reset", dependencies=[Depends(_of_this_page)])
    def reset() -> Response:
        """Go back to the source model and the beginning of the stream."""
        return _answer(player.reset())


def _of_this_page(request: Request) -> None:
    """Refuse what the page of another host asks for: a browser says where a POST comes from."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
        raise HTTPException(403, "Only the buttons of this page are answered.")


def _answer(view: View) -> Response:
    return Response(view.body, media_type="application/json", headers={"Cache-Control": "no-store"})


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}."}, 422)


# ---------------------------------------------------------------------- the page


def _page(title: str, method: str) -> str:
    """The page with a button for each corruption, severity and method."""
    about = {name: facts["about"] for name, facts in config.load(".", "methods").items()}
    offered = methods.available(task="classification", two_towers=False)
    return Template(_read("page.html")).substitute(
        title=escape(title),
        corruptions=_buttons("corruption", OFFERED),
        severities=_buttons("severity", map(str, SEVERITIES)),
        methods=_buttons("method", offered if method in offered else [method, *offered], about),
    )


def _buttons(what: str, names: Iterable[str], about: Mapping[str, str] | None = None) -> str:
    return "\n".join(
        f'<button type="button" data-set="{what}" value="{escape(name)}" aria-pressed="false" '
        f'title="{escape((about or {}).get(name, ""))}">{escape(name)}</button>'
        for name in names
    )


def _read(name: str) -> str:
    return (resources.files("tta.demo") / name).read_text(encoding="utf-8")
