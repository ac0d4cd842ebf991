"""The models of a ``models.yaml``, as the HTTP layer asks for them."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from shellv_core.config import nearest
from shellv_core.errors import ShellVError
from shellv_core.logs import get_logger
from shellv_core.serving.engine import EngineHealth, NotReadyError
from shellv_core.serving.gateway.config import ModelsFile, RouteEntry
from shellv_core.serving.gateway.line import WAITS, Line
from shellv_core.serving.gateway.shadow import ShadowedEngine
from shellv_core.serving.models import ModelNotFoundError, ServedModel

logger = get_logger(__name__)


class GatewayModels:
    """Models that come up, change and go while requests are answered; see `Models`.

    Loading begins at once, in the background.

    Args:
        content: what is served.
        reread: gives what should be served now; None where that stays as it is.
    """

    def __init__(self, content: ModelsFile, reread: Callable[[], ModelsFile] | None = None) -> None:
        self._content, self._reread = content, reread
        self._lines = {entry.id: Line(entry, content.poll_seconds) for entry in content.models}
        self._draining = False

    def await_first(self) -> None:
        """Return when every model is loaded, or waits for what comes from elsewhere: an alias, a server.

        Raises:
            ShellVError: if one cannot be loaded.
        """
        for line in self._lines.values():
            line.await_look()
            elsewhere = line.entry.follows_alias or line.entry.engine == "http"
            if line.error is not None and not (elsewhere and isinstance(line.error, WAITS)):
                for each in self._lines.values():
                    each.close()
                raise line.error

    def reload(self) -> None:
        """Take up what the file says now; a file that is wrong changes nothing but the log."""
        if self._reread is None:
            return
        try:
            content = self._reread()
        except ShellVError as error:
            logger.error("the models stay as they are: %s", error)
            return
        lines = dict(self._lines)
        wanted = {entry.id: entry for entry in content.models}
        for name, entry in wanted.items():
            if name not in lines:
                lines[name] = Line(entry, content.poll_seconds)
            elif lines[name].entry != entry:
                lines[name].change(entry)
        gone = [lines.pop(name) for name in list(lines) if name not in wanted]
        self._lines, self._content = lines, content
        for line in gone:
            line.close()
        logger.info("models.yaml was read again: %s", ", ".join(wanted))

    def find(self, name: str | None = None, user: str | None = None) -> ServedModel:
        """See `Models.find`.

        Raises:
            NotReadyError: if the model is known, and not loaded.
        """
        content = self._content
        if name is None:
            name = (content.routes[0] if content.routes else content.models[0]).id
        route = next((route for route in content.routes if route.id == name), None)
        if route is not None:
            return self._routed(route, user)
        served = self._served().get(name)
        if served is not None:
            return served
        for entry in content.models:
            if name == entry.id or name in entry.adapters:
                raise NotReadyError(f"the model {name!r} is not there yet: {self._lines[entry.id].problem}")
        known = [*(route.id for route in content.routes), *self._served()]
        raise ModelNotFoundError(
            f"the model {name!r} is not served here; {nearest(name, known)}", "model", "model_not_found"
        )

    def list(self) -> Sequence[ServedModel]:
        """See `Models.list`; a route names as its parent the model that answers most of it."""
        served = self._served()
        routes = []
        for route in self._content.routes:
            first = next((served[name] for name in _by_weight(route) if name in served), None)
            if first is not None:
                routes.append(replace(first, name=route.id, parent=first.name))
        return [*served.values(), *routes]

    def health(self) -> EngineHealth:
        """Alive while all loaded engines are; ready once each entry has been tried and while one model takes requests;
        the reason names those that do not."""
        lines = list(self._lines.values())
        loaded = [(line, line.models[0].engine.health()) for line in lines if line.models]
        reasons = [f"{line.entry.id}: {line.problem}" for line in lines if line.problem]
        reasons += [f"{line.entry.id}: {health.reason}" for line, health in loaded if health.reason]
        if self._draining:
            reasons = ["shutting down"]
        is_ready = any(health.ready for _, health in loaded) and all(line.has_looked for line in lines)
        alive = all(health.alive for _, health in loaded)
        return EngineHealth(alive, is_ready and not self._draining, "; ".join(reasons))

    async def drain(self, deadline_seconds: float) -> None:
        """See `Models.drain`."""
        self._draining = True
        await asyncio.gather(*(line.drain(deadline_seconds) for line in self._lines.values()))

    def _served(self) -> dict[str, ServedModel]:
        """What is loaded, by name; what servers elsewhere call like something of ours is left out."""
        served: dict[str, ServedModel] = {}
        lines = self._lines.values()
        for line in lines:
            for model in line.models:
                if model.adapter is None or model.name not in self._lines:
                    served.setdefault(model.name, model)
        return served

    def _routed(self, route: RouteEntry, user: str | None) -> ServedModel:
        served = self._served()
        drawn = _draw(route, user)
        # A canary that did not come up takes nobody down.
        name = next((each for each in (drawn, *_by_weight(route)) if each in served), None)
        if name is None:
            raise NotReadyError(f"the model {route.id!r} is not there yet: {self.health().reason}")
        model = replace(served[name], name=route.id, parent=name)
        shadow = route.shadow and served.get(route.shadow.model)
        if route.shadow and shadow and random.uniform(0, 100) < route.shadow.percent:
            return replace(model, engine=ShadowedEngine(model.engine, shadow.engine, shadow.adapter))
        return model


def _draw(route: RouteEntry, user: str | None) -> str:
    """The model for one request: by chance, or by who asks, so that a change of weights moves as few as it must."""
    point = random.random()
    if user is not None:
        point = int.from_bytes(hashlib.sha256(f"{route.id} {user}".encode()).digest()[:8]) / 2**64
    point *= sum(route.weights.values())
    for name, weight in route.weights.items():
        if point < weight:
            return name
        point -= weight
    return _by_weight(route)[0]


def _by_weight(route: RouteEntry) -> list[str]:
    """Models that get requests, most first."""
    return sorted((name for name in route.weights if route.weights[name]), key=lambda name: -route.weights[name])
