"""``models.yaml``: what one gateway serves, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shellv_core.config import Config, build_config, nearest, read_yaml
from shellv_core.models.config import Quantization
from shellv_core.serving.http.config import ApiConfig
from shellv_core.serving.inference.loading import Dtype
from shellv_core.serving.transformers_engine import EngineConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


class ModelEntry(Config):
    """A model that clients can name."""

    id: Name
    """The name."""
    engine: Literal["embedded", "worker", "http"] = "embedded"
    """In the gateway's own process, in a process for each replica, or behind servers elsewhere."""
    model: str = ""
    """A reference as ``--model`` takes it; of ``http`` the id that the servers use, empty for their only one."""
    follow: bool = True
    """Take up what ``models:/NAME@ALIAS`` names whenever that changes."""
    swap: Literal["beside", "stop_first"] = "beside"
    """Load a new revision beside the old one, which answers until then; or stop the old one before, where the memory
    does not hold two, and answer 503 in the meantime."""
    adapters: dict[Name, str] = {}
    """Model id -> the adapter's directory or the s3:// or file:// address of finetune's output."""
    quantization: Quantization | None = None
    dtype: Dtype = "float32"
    device: str = "cpu"
    """As torch spells it; ``auto`` spreads one model over all GPUs."""
    heads: str | None = None
    """Of ``embedded``: HACL's heads for the hallucination view, as in `fetch_heads`; None for those that the model's
    lineage leads to, if any."""
    thresholds: Path | None = None
    """Of ``embedded``: what that view marks, as ``shellv calibrate`` wrote it for this very revision."""
    options: EngineConfig = EngineConfig()
    """Slots, context, memory and queue."""

    replicas: int = Field(default=1, ge=1, le=64)
    """Of ``worker``: processes, each with a copy of the model."""
    devices: tuple[str, ...] = ()
    """Of ``worker``: where the replicas run, in turn; empty for `device`."""
    start_seconds: float = Field(default=900.0, gt=0)
    """Of ``worker``: how long loading may take."""

    urls: tuple[str, ...] = ()
    """Of ``http``: addresses of the servers, for example ``http://10.0.0.5:8000``."""
    discover: bool = False
    """Of ``http``: every address that a url's host name resolves to is a server, as behind a headless Service."""
    operations_port: int | None = Field(default=None, ge=1, le=65535)
    """Of ``http``: where our own servers tell their load, on the same host."""
    api_key_variable: str = ""
    """Of ``http``: environment variable that holds the servers' key."""

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an address like http://HOST:PORT")
        return urls

    @model_validator(mode="after")
    def _fits_together(self) -> ModelEntry:
        if self.engine == "http" and not self.urls:
            raise ValueError(f"model {self.id!r} has engine: http and needs urls")
        if self.engine != "http" and (self.urls or not self.model):
            wrong = "urls belong to engine: http" if self.urls else "a model reference is needed"
            raise ValueError(f"model {self.id!r} has engine: {self.engine}; {wrong}")
        if self.engine != "embedded" and (self.heads is not None or self.thresholds is not None):
            raise ValueError(f"model {self.id!r} has engine: {self.engine}; heads and thresholds belong to embedded")
        if self.engine != "worker" and (self.replicas > 1 or self.devices):
            raise ValueError(f"model {self.id!r} has engine: {self.engine}; replicas and devices belong to worker")
        if self.engine == "http" and self.adapters:
            raise ValueError(f"model {self.id!r}: the servers of engine: http bring their own adapters")
        return self

    @property
    def follows_alias(self) -> bool:
        """Whether what the reference names may change."""
        return self.follow and self.engine != "http" and self.model.startswith("models:") and "@" in self.model


class Shadow(Config):
    """A share of the requests is sent to another model as well, whose answers are dropped."""

    model: Name
    percent: float = Field(gt=0, le=100)


class RouteEntry(Config):
    """A name whose requests are split among models; one user (or key) stays with one model."""

    id: Name
    weights: dict[Name, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    shadow: Shadow | None = None

    @field_validator("weights")
    @classmethod
    def _one_is_positive(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError("one weight at least must be more than 0")
        return weights


class ModelsFile(Config):
    """The content of ``models.yaml``; the first route, or without any the first model, is asked by default."""

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    routes: tuple[RouteEntry, ...] = ()
    poll_seconds: float = Field(default=5.0, gt=0)
    """Between two looks at what aliases name."""
    api: ApiConfig = ApiConfig()
    """Limits of the HTTP layer; read at the start only."""

    @field_validator("models", "routes", mode="before")
    @classmethod
    def _each_by_itself(cls, value: Any, info: ValidationInfo) -> Any:
        """So that a fault names the entry's own keys."""
        kind = ModelEntry if info.field_name == "models" else RouteEntry
        if not isinstance(value, list | tuple):
            return value
        return tuple(build_config(kind, each) if isinstance(each, dict) else each for each in value)

    @model_validator(mode="after")
    def _names_are_clear(self) -> ModelsFile:
        models = [name for entry in self.models for name in (entry.id, *entry.adapters)]
        names = [*models, *(route.id for route in self.routes)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} names two things")
        for route in self.routes:
            for name in (*route.weights, *([route.shadow.model] if route.shadow else [])):
                if name not in models:
                    raise ValueError(
                        f"route {route.id!r} names {name!r}, which is no model here; {nearest(name, models)}"
                    )
        return self


def read_models(path: Path) -> ModelsFile:
    """The content of a ``models.yaml``.

    Raises:
        ConfigError: if it cannot be read, or says something that is not allowed.
    """
    return build_config(ModelsFile, read_yaml(path))
