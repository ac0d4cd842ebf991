"""What an evaluation asks of whom, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shellv_core.endpoint.asking import Endpoint
    from shellv_core.stages.evaluate import EvaluateConfig
    from shellv_core.stages.runner import StageResult
    from shellv_core.storage import InputReference, Manifest

#: The source that an evaluation runs, beside ``stages/evaluate.py``.
CODE = (
    "endpoint", "evaluation", "models",
    *(f"stages/evaluate_{name}.py" for name in ("asking", "shards", "task")),
)  # fmt: skip


class Task:
    """What is asked of whom, checked before anything is loaded.

    Attributes:
        inputs: input name -> URI of a committed folder, None where there is none.
        references: the inputs that are none: model directories and the user's benchmarks.
        folders: model name -> model directory.
        remote: those of "model" and "judge" that are endpoints.
        benchmarks: the user's.
        images: image name -> file, of the user's benchmarks.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        from shellv_core.errors import ConfigError
        from shellv_core.evaluation.selection import read_selected
        from shellv_core.serving.reference import find_registered
        from shellv_core.storage import InputReference

        self.references: dict[str, InputReference] = {}
        self.folders: dict[str, Path] = {}
        selected = read_selected(config.benchmarks)
        self.benchmarks, self.images = selected.benchmarks, selected.images
        if self.benchmarks:
            self.references["benchmarks"] = InputReference(uri="benchmarks", content_sha256=selected.content_sha256)
        self.inputs: dict[str, str | None] = {"data": config.data_uri or (None if self.benchmarks else "")}
        addresses = {"model": config.model_uri, "baseline": config.baseline_uri or None, "judge": config.judge_uri}
        for name, uri in addresses.items():
            if uri is None or (_is_endpoint(uri) and name != "baseline"):
                continue
            if uri.startswith("models:"):
                uri = find_registered(uri).uri
            folder = _model_folder(uri)
            if folder is None:
                self.inputs[name] = uri
            else:
                self.folders[name] = folder
                self.references[name] = InputReference(uri=folder.as_uri(), content_sha256=_content_of(folder))
        if _is_endpoint(config.baseline_uri):
            raise ConfigError(
                f"baseline_uri={config.baseline_uri!r}: only the candidate and the judge can be endpoints."
            )
        judged = [each for each in self.benchmarks if hasattr(each, "judge_questions")]
        if judged and not config.judge_uri:
            raise ConfigError(
                f"the benchmark {'_'.join(judged[0].key)} needs a judge; give judge_uri=https://HOST/v1 with"
                " judge.model, or a model directory."
            )
        self.config = config
        self.remote = [name for name in ("model", "judge") if _is_endpoint(addresses[name])]

    def is_whole(self, committed: Manifest) -> bool:
        """Whether an evaluation lacks no more answers than allowed."""
        missing, asked = committed.details.get("num_missing", 0), committed.details.get("num_asked", 0)
        return bool(missing <= self.config.max_missing_share * asked)

    def check_missing(self, result: StageResult) -> None:
        """Raise `EvaluationError` if more answers are missing than allowed."""
        from shellv_core.errors import EvaluationError
        from shellv_core.evaluation.answers import told

        missing, asked = result.details.get("num_missing", 0), result.details.get("num_asked", 0)
        if missing > self.config.max_missing_share * asked:
            reasons = {
                f"{name}, {reason}": count
                for name, counts in result.details["missing"].items()
                for reason, count in counts["by_reason"].items()
            }
            raise EvaluationError(
                f"{missing} of {asked} answers are missing ({told(reasons)}). The results at {result.output_uri} count"
                " them as missing, and missing.json names them. Run again to ask these once more, or allow for them"
                " with max_missing_share."
            )

    def open_endpoint(self, name: str) -> Endpoint:
        """The endpoint "model" or "judge", its access checked."""
        from shellv_core.endpoint.asking import Endpoint
        from shellv_core.endpoint.config import EndpointConfig
        from shellv_core.storage import home

        config = self.config
        is_judge = name == "judge"
        access = config.judge if is_judge else config.endpoint
        values = access.model_dump() | {"cache_path": access.cache_path or str(home() / "cache" / "endpoint")}
        if not is_judge and config.top_p < 1:
            values["body"] = {"top_p": config.top_p, **values["body"]}
        endpoint = Endpoint(
            EndpointConfig(
                **values,
                base_url=str(config.judge_uri if is_judge else config.model_uri),
                temperature=0.0 if is_judge else config.temperature,
                max_tokens=config.max_judgment_tokens,
            )
        )
        endpoint.check_access()
        return endpoint


def _is_endpoint(uri: str | None) -> bool:
    return bool(uri) and str(uri).startswith(("http://", "https://"))


def _model_folder(uri: str) -> Path | None:
    """The directory at `uri` where it is a model's own, None where it is a stage's output or missing."""
    from shellv_core.storage import local_path

    path = Path(uri).absolute() if uri and "://" not in uri else local_path(uri) if uri.startswith("file:") else None
    return path if path is not None and (path / "config.json").is_file() else None


def _content_of(folder: Path) -> str:
    from shellv_core.config import fingerprint
    from shellv_core.storage import sha256_of

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint([(path.relative_to(folder).as_posix(), sha256_of(path)) for path in files])
