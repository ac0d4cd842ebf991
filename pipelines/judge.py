"""The pipeline that judges a model that is there already, and promotes it if it passes."""

from kfp import dsl

from components.evaluate.component import evaluate
from components.promote.component import promote
from pipelines.definition import Definition
from pipelines.guard import checked, reported
from pipelines.placement import Placement

STAGES = ("evaluate", "promote")


def shellv_evaluate(
    place: Placement,
    root_uri: str,
    data_uri: str,
    model_uri: str,
    baseline_uri: str = "",
    preset: str = "nano",
    overrides: list[str] = [],  # noqa: B006 - kfp reads the literal
    registered_model: str = "",
) -> None:
    """Judge a model against its blind run and a baseline, and promote it if it passes.

    Args:
        root_uri: Folder of all outputs, s3://BUCKET/PREFIX; each goes to a folder named after its content.
        data_uri: Output of prepare_data, with the benchmarks.
        model_uri: Output of merge_lora, or of finetune without LoRA.
        baseline_uri: The model that it is held against, of the same kind; empty for none.
        preset: Settings of the stages.
        overrides: Single settings that differ from the preset, as STAGE.key=value.
        registered_model: Name in the model registry; empty for the preset's.
    """
    settings = {"root_uri": root_uri, "preset": preset, "overrides": overrides}
    with dsl.ExitHandler(reported(place, root_uri), name="run"):
        checks = checked(place, STAGES, settings)
        judged = place(
            evaluate(
                data_uri=data_uri,
                model_uri=model_uri,
                baseline_uri=baseline_uri,
                cache_salt=checks.cache_salt,
                **checks.settings("evaluate"),
            ),
            "evaluate",
        )
        place(
            promote(
                model_uri=model_uri,
                evaluation_uri=judged.outputs["Output"],
                registered_model=registered_model,
                **checks.settings("promote"),
            ),
            "promote",
        )


SHELLV_EVALUATE = Definition("shellv-evaluate", "Shell-V: judge and promote a model", shellv_evaluate, ("evaluation",))
