"""The HTTP side: requests become pictures for the service, and answers become JSON."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from tta.adapter import Adapter
from tta.serve import bodies, feedback
from tta.serve.example import DIGIT
from tta.serve.feedback import MOST, Counted, Questions
from tta.serve.refusals import Refusal
from tta.serve.service import Service
from tta.serve.settings import ServeSettings

LOG = logging.getLogger("tta.serve")
Scope = MutableMapping[str, Any]
ABOUT = """\
A classifier that adapts to the pictures it is asked about. `POST /predict` takes a picture as it is, several as a form, or base64
in JSON. Answers (`/queries`, `/feedback`), what else changes the adapter (`/reset`, `/snapshot`, `/rollback`, `/pause`) and `/export`
need the server's token."""
BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": bodies.Base64Images.model_json_schema(),
            "example": {"images": [DIGIT]},
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg")},
    },
}


class Class(BaseModel):
    """A class and its probability."""

    label: int = Field(description="Number of the class.", examples=[3])
    name: str | None = Field(description="Its name, where the weights say it.", examples=["3"])
    probability: float = Field(examples=[0.98])


class Prediction(Class):
    """The most probable class of a picture."""

    id: str = Field(description="Of this prediction, to speak of it later.")
    answered: str = Field(
        description="learned: the adapter predicted, and learned from the batch; held: it predicted only; source: the "
        "source model answered.",
        examples=["learned"],
    )
    top: list[Class] = Field(description="The most probable classes.")


class Predictions(BaseModel):
    """Predictions in the order of the pictures."""

    predictions: list[Prediction]


class Said(BaseModel):
    """A sentence."""

    detail: str


def answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The errors of an endpoint, for the OpenAPI page: each a sentence."""
    return {code: {"model": Said} for code in codes}


def create_app(
    adapter: Adapter,
    settings: ServeSettings | None = None,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> FastAPI:
    """An ASGI application that predicts with an adapter, which learns from what it is asked.

    It must run in one process: each would adapt a copy of its own.

    Args:
        adapter: it must not be used elsewhere from now on.
        settings: see :class:`ServeSettings`.
        preprocessing: that of the model; left out, what :func:`tta.load_model` recorded in it, if it made it. Without an
            ``input_size`` pictures keep their size.
        class_names: in the order of the logits; left out, those of the weights, where they say them.

    Raises:
        ValueError: the saved states are of another adapter, another server uses their folder, or the task is not
            classification.

    Example:
        >>> import tta
        >>> from tta.serve import create_app
        >>> app = create_app(tta.adapt(tta.load_model("digits-cnn")))  # uvicorn.run(app)
    """
    if adapter.task.name != "classification":
        raise ValueError(f"The server answers with one class an image; it does not serve {adapter.task.name}.")
    model = adapter.model
    service = Service(
        adapter,
        settings or ServeSettings(),
        spec=getattr(model, "spec", type(model).__name__),
        preprocessing=getattr(model, "preprocessing", {}) if preprocessing is None else preprocessing,
        class_names=getattr(model, "class_names", None) if class_names is None else class_names,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        LOG.info("serving", extra={"facts": {"model": service.state()["model"], "method": adapter.method}})
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.stop)

    app = FastAPI(title="tta serve", description=ABOUT, version=service.state()["version"], lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Observed, service=service)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_predict(app, service)
    _add_watching(app, service)
    _add_feedback(app, service)
    _add_control(app, service)
    return app


# ---------------------------------------------------------------------- predict


def _add_predict(app: FastAPI, service: Service) -> None:
    settings, slots = service.settings, Slots(service)
    room = bodies.Room(settings.max_requests * settings.max_body)

    @app.post(
        "/predict",
        openapi_extra={"requestBody": BODY},
        responses=answers(400, 408, 413, 415, 422, 429, 503, 504),
        tags=["predict"],
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=10_000, description="Classes to name, the most probable ones.")] = 5,
    ) -> Predictions:
        """Predict one picture or several; the adapter learns from them, together with those of other requests."""
        slots.check()
        start = time.monotonic()
        try:  # a place is taken only when the body is there: clients that send slowly keep no others out
            body = await asyncio.wait_for(bodies.read(request, settings.max_body, room), settings.timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal(408, f"The body did not arrive within {settings.timeout:g} s.") from None
        with slots.one():
            try:
                return await asyncio.wait_for(answer(request, body, top), settings.timeout - (time.monotonic() - start))
            except (TimeoutError, asyncio.TimeoutError):
                raise Refusal(504, f"There was no answer within {settings.timeout:g} s: ask again later.") from None

    async def answer(request: Request, body: bytes, top: int) -> Predictions:
        files = await bodies.pictures(request, body, settings)
        loop = asyncio.get_running_loop()
        images = await loop.run_in_executor(service.decoders, service.decode, files)
        try:
            found = await asyncio.wrap_future(service.worker.submit(images))
        except ValueError as error:  # of the adapter: pictures that this model does not take
            raise Refusal(422, str(error)) from None
        except RuntimeError as error:
            raise Refusal(503, f"The picture was not predicted: {error}.") from None
        request.scope["images"] = len(found)
        return Predictions.model_validate({"predictions": [service.described(one, top) for one in found]})


class Slots:
    """Places for the requests in work, whose bodies are there."""

    def __init__(self, service: Service) -> None:
        self.most, self.taken, self.gauge = service.settings.max_requests, 0, service.metrics.in_flight

    def check(self) -> None:
        """Raise a refusal if all are taken."""
        if self.taken >= self.most:
            raise Refusal(429, f"{self.most} requests are in work: ask again in a second.")

    @contextmanager
    def one(self) -> Iterator[None]:
        """A place within this context; a refusal if all are taken."""
        self.check()
        self.taken += 1
        self.gauge.set(self.taken)
        try:
            yield
        finally:
            self.taken -= 1
            self.gauge.set(self.taken)


# ---------------------------------------------------------------------- watch


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/metrics", response_class=Response, tags=["watch"])
    def metrics() -> Response:
        """Counts and gauges, as Prometheus reads them."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", responses=answers(503), tags=["watch"])
    async def healthz() -> Said:
        """Whether the process is of use; if not, restart it."""
        if not service.worker.alive:
            raise Refusal(503, "The thread of the adapter has ended: restart the server.")
        return Said(detail="alive")

    @app.get("/readyz", responses=answers(503), tags=["watch"])
    async def readyz() -> Said:
        """Whether requests are answered; if not, send them elsewhere."""
        if not service.worker.ready:
            raise Refusal(503, "The server is starting or stopping.")
        return Said(detail="ready")

    @app.get("/state", tags=["watch"])
    async def state() -> dict[str, Any]:
        """Method, configuration, fingerprint of the source weights, what adapts, and counts."""
        return service.state()


# ---------------------------------------------------------------------- control


def _allowed(token: str | None) -> Callable[..., None]:
    """A dependency that lets those pass who know the token."""
    bearer = HTTPBearer(auto_error=False, description="The server's token.")

    def allowed(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if token is None:
            raise Refusal(
                403, "This server has no token, so that nobody can control it: start it with TTA_SERVE_TOKEN."
            )
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(401, "Send the header 'Authorization: Bearer TOKEN'.", {"WWW-Authenticate": "Bearer"})

    return allowed


def _called(service: Service) -> Callable[[Callable[[Adapter], Any]], Awaitable[Any]]:
    async def called(function: Callable[[Adapter], Any]) -> Any:
        """The result of a function on the worker's thread."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(service.worker.call(function)), service.settings.timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal(504, "The adapter is busy: ask again later.") from None
        except (RuntimeError, OSError) as error:
            raise Refusal(503, f"That could not be done: {error}") from None

    return called


def _add_feedback(app: FastAPI, service: Service) -> None:
    called, settings = _called(service), service.settings
    needs_token = [Depends(_allowed(settings.token))]
    body = {"required": True, "content": {"application/json": {"schema": feedback.Feedback.model_json_schema()}}}

    @app.get("/queries", dependencies=needs_token, responses=answers(401, 403, 409, 422, 503, 504), tags=["feedback"])
    async def queries(
        count: Annotated[int, Query(ge=1, le=MOST, description="Questions at most.")] = 1,
    ) -> Questions:
        """Ids of the predictions that the adapter would like to be told about."""
        return Questions(ids=await called(service.asking(count)))

    @app.post(
        "/feedback",
        dependencies=needs_token,
        openapi_extra={"requestBody": body},
        responses=answers(400, 401, 403, 408, 409, 413, 422, 503, 504),
        tags=["feedback"],
    )
    async def tell(request: Request) -> Counted:
        """Say whether predictions were right, or which class it was; late, and for a few."""
        try:
            given = await asyncio.wait_for(feedback.read(request, settings.max_body), settings.timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal(408, f"The body did not arrive within {settings.timeout:g} s.") from None
        return Counted(**await called(service.telling(given)))


def _add_control(app: FastAPI, service: Service) -> None:
    called = _called(service)
    control: dict[str, Any] = {
        "tags": ["control"],
        "dependencies": [Depends(_allowed(service.settings.token))],
        "responses": answers(401, 403, 409, 422, 503, 504),
    }

    @app.post("/reset", **control)
    async def reset() -> Said:
        """Go back to the source model."""
        return Said(detail=await called(service.reset))

    @app.post("/snapshot", **control)
    async def snapshot() -> Said:
        """Keep the present state."""
        return Said(detail=await called(service.snapshot))

    @app.post("/rollback", **control)
    async def rollback() -> Said:
        """Go back to the state that was last kept."""
        return Said(detail=await called(service.rollback))

    @app.post("/pause", **control)
    async def pause(on: bool = True) -> Said:
        """Predict only; with `on=false` learn again."""
        return Said(detail=await called(service.pausing(on)))

    @app.get("/export", response_class=Response, **control)
    async def export() -> Response:
        """The weights of a plain model with what was learned, as a safetensors file."""
        return Response(
            await called(service.export),
            media_type="application/octet-stream",
            headers={"Content-Disposition": 'attachment; filename="model.safetensors"'},
        )


# ---------------------------------------------------------------------- around every request


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {"Retry-After": "1"} if error.status in (429, 503, 504) else {}
    return JSONResponse({"detail": error.sentence}, error.status, headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)


class Observed:
    """Counts, times and logs every request."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self.app, self.metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, code = time.perf_counter(), 500

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            seconds = time.perf_counter() - start
            endpoint = getattr(scope.get("route"), "path", "other")  # of the application's own: a bounded number
            self.metrics.requests.labels(endpoint, code).inc()
            if endpoint == "/predict":
                self.metrics.seconds.observe(seconds)
                facts = {
                    "path": endpoint,
                    "status": code,
                    "ms": round(1000 * seconds, 1),
                    "images": scope.get("images", 0),
                }
                LOG.info("request", extra={"facts": {**facts, "client": (scope.get("client") or ("",))[0]}})
