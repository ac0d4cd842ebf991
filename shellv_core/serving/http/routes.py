"""The endpoints of the public port."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from shellv_core.serving.engine import EngineStoppedError, GenerationRequest, ImagePart, RequestError
from shellv_core.serving.hallucination import HallucinationView, view_answer
from shellv_core.serving.http.answers import Answers, Collected, unless_disconnected
from shellv_core.serving.http.bodies import Extensions, SamplingBody, StreamOptions
from shellv_core.serving.http.chat_bodies import ChatCompletion, ChatCompletionChunk, ChatRequest
from shellv_core.serving.http.completion_bodies import (
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    TokenCount,
    TokenizeRequest,
)
from shellv_core.serving.http.config import ApiConfig
from shellv_core.serving.http.errors import ErrorResponse, documented
from shellv_core.serving.http.formats import ChatFormat, CompletionFormat, Format, Viewer, Writer
from shellv_core.serving.http.metrics import Metrics
from shellv_core.serving.http.requests import Reader
from shellv_core.serving.http.stream import EventStream
from shellv_core.serving.models import Models, ServedModel

ANSWER_FAULTS = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)


@dataclass(frozen=True)
class Api:
    """What the endpoints work with."""

    models: Models
    reader: Reader
    config: ApiConfig
    metrics: Metrics

    async def answer(
        self,
        http_request: Request,
        body: SamplingBody,
        model: ServedModel,
        request: GenerationRequest,
        shape: Format,
        stack: contextlib.AsyncExitStack,
    ) -> Response:
        """Let `model` answer; `stack` ends what the answer holds, at once or when a stream is over."""
        count = body.n or 1
        extensions = body.shellv or Extensions()
        viewer = None
        if extensions.hallucination:
            viewer, request = _viewer(model, request), replace(request, logprobs=True)
        answers = Answers(model, request, count, self.config.timeouts, self.metrics, http_request.state.arrived)
        stack.push_async_callback(answers.aclose)
        await unless_disconnected(http_request, answers.begin())
        writer = Writer(shape, model, extensions.return_token_ids, viewer)
        headers = {"x-model-revision": model.revision}
        if body.stream:
            options = body.stream_options or StreamOptions()
            events = writer.stream(answers, count, options.include_usage, options.continuous_usage_stats)
            return EventStream(events, headers, self.config.timeouts.ping_seconds, stack.pop_all())
        return JSONResponse(await unless_disconnected(http_request, writer.whole(answers)), headers=headers)


def generation_routes(api: Api) -> APIRouter:
    """The endpoints that ask a model."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=_streamed(ChatCompletionChunk) | documented(*ANSWER_FAULTS),
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation; with `stream` as server-sent events that end with ``[DONE]``."""
        request.state.arrived = time.monotonic()
        model = api.models.find(body.model, _asker(body, request))
        async with contextlib.AsyncExitStack() as stack:
            lease = stack.enter_context(api.reader.decoder.lease())
            wanted = await unless_disconnected(request, api.reader.chat(body, model.adapter, lease))
            return await api.answer(request, body, model, wanted, ChatFormat(bool(body.logprobs)), stack)

    @router.post(
        "/v1/completions",
        response_model=Completion,
        responses=_streamed(Completion) | documented(*ANSWER_FAULTS),
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text; with `stream` as server-sent events that end with ``[DONE]``."""
        request.state.arrived = time.monotonic()
        model = api.models.find(body.model, _asker(body, request))
        async with contextlib.AsyncExitStack() as stack:
            wanted = api.reader.completion(body, model.adapter)
            return await api.answer(request, body, model, wanted, CompletionFormat(body.logprobs is not None), stack)

    @router.post("/tokenize", response_model=TokenCount, responses=documented(400, 401, 403, 404, 408, 413, 429, 503))
    async def count_tokens(body: TokenizeRequest, request: Request) -> TokenCount:
        """Count the tokens that a conversation or a text takes, pictures included."""
        if (body.messages is None) == (body.prompt is None):
            raise RequestError("give messages or prompt, one of them.", "messages")
        model = api.models.find(body.model)
        with api.reader.decoder.lease() as lease:
            if body.messages is None:
                messages = api.reader.text(body.prompt or "")
            else:
                messages = await unless_disconnected(request, api.reader.messages(body.messages, lease))
            count = await unless_disconnected(request, model.engine.count_tokens(messages))
        return TokenCount(count=count, max_model_len=model.engine.context_length)

    return router


def catalog_routes(api: Api) -> APIRouter:
    """The endpoints that tell what is served."""
    router = APIRouter()

    @router.get("/v1/models", responses=documented(401, 403, 429))
    async def list_models() -> ModelList:
        """The models that are served, each adapter with its parent."""
        return ModelList(data=[_card(model) for model in api.models.list()])

    @router.get("/v1/models/{model_id:path}", responses=documented(401, 403, 404, 429, 503))
    async def retrieve_model(model_id: Annotated[str, Path(min_length=1)]) -> ModelCard:
        """One model."""
        return _card(api.models.find(model_id))

    return router


def _viewer(model: ServedModel, request: GenerationRequest) -> Viewer:
    """Tells what in an answer to `request` may be made up."""
    images = [part.image for message in request.messages for part in message.parts if isinstance(part, ImagePart)]

    async def view(answer: Collected) -> HallucinationView:
        text = "".join(answer.texts)
        try:
            return await view_answer(text, answer.logprobs, images, model.grounding, model.thresholds)
        except EngineStoppedError:
            # The answer is whole; what is lost as the server stops is what the heads think of it.
            return await view_answer(text, answer.logprobs, thresholds=model.thresholds)

    return view


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=model.created,
        parent=model.parent,
        revision=model.revision,
        context_length=model.engine.context_length,
    )


def _asker(body: SamplingBody, request: Request) -> str | None:
    """Who asks: the body's word for it, else the key's holder, if there are keys."""
    holder = request.state.holder
    return body.user or (None if holder == "-" else holder)


def _streamed(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A response that is JSON, or a stream of `chunk` where the request says so."""
    content = [{"$ref": f"#/components/schemas/{each.__name__}"} for each in (chunk, ErrorResponse)]
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": content}}
    data = {"anyOf": [json_text, {"const": "[DONE]"}]}
    text = f"Events whose data is a {chunk.__name__}, or an ErrorResponse, and at last `[DONE]`."
    schema = {"type": "object", "description": text, "properties": {"data": data}, "required": ["data"]}
    return {200: {"description": "The answer.", "content": {"text/event-stream": {"schema": schema}}}}
