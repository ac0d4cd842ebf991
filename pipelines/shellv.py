"""The pipeline from data to a served champion, with and without HACL."""

from typing import NamedTuple

from kfp import dsl

from components.deploy.component import deploy
from components.evaluate.component import evaluate
from components.finetune.component import finetune
from components.merge_lora.component import merge_lora
from components.prepare_data.component import prepare_data
from components.pretrain_projector.component import pretrain_projector
from components.promote.component import promote
from pipelines.placement import Placement

WITHOUT_HACL = ["finetune.hacl.weight=0"]


class Outputs(NamedTuple):
    """URIs of what the pipeline made."""

    model_uri: str
    evaluation_uri: str
    promotion_uri: str
    deployment_uri: str


@dsl.pipeline(name="shellv", display_name="Shell-V: train, judge, promote, deploy")
def shellv(
    root_uri: str,
    preset: str = "nano",
    overrides: list[str] = [],  # noqa: B006 - kfp reads the literal
    registered_model: str = "shellv-nano",
    k8s_secret: str = "shellv-storage",  # noqa: S107 - the name of a Secret
    k8s_config_map: str = "shellv-services",
    k8s_accelerator: str = "nvidia.com/gpu",
    k8s_num_accelerators: str = "0",
    k8s_node_selector: dict = {},  # noqa: B006
    k8s_tolerations: list = [],  # noqa: B006
) -> Outputs:
    """Train a vision-language model with and without HACL, judge both, promote the first if it passes, and serve it.

    Args:
        root_uri: Folder of all outputs, s3://BUCKET/PREFIX; each goes to a folder named after its content.
        preset: Settings of all stages.
        overrides: Single settings that differ from the preset, as STAGE.key=value.
        registered_model: Name in the model registry, a different one for each preset.
        k8s_secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
        k8s_config_map: ConfigMap with AWS_ENDPOINT_URL, AWS_REGION and MLFLOW_TRACKING_URI.
        k8s_accelerator: Resource name of the accelerator.
        k8s_num_accelerators: Accelerators for each training and evaluation task; 0 for CPU.
        k8s_node_selector: Labels that the nodes of those tasks must have.
        k8s_tolerations: Tolerations of those tasks.
    """
    place = Placement(
        secret=k8s_secret,
        config_map=k8s_config_map,
        accelerator=k8s_accelerator,
        num_accelerators=k8s_num_accelerators,
        node_selector=k8s_node_selector,
        tolerations=k8s_tolerations,
    )
    settings = {"root_uri": root_uri, "preset": preset, "overrides": overrides}

    # These three look at the world outside their inputs, so a cached answer may be stale; rerunning them is cheap.
    data = place.connect(prepare_data(**settings)).set_caching_options(False).set_display_name("prepare data")

    projector = place.accelerate(pretrain_projector(data_uri=data.outputs["Output"], **settings))
    projector.set_display_name("pretrain projector")
    inputs = {"data_uri": data.outputs["Output"], "model_uri": projector.outputs["Output"], **settings}

    models = {}
    for name, task_overrides in {"with HACL": [], "without HACL": WITHOUT_HACL}.items():
        adapter = place.accelerate(finetune(**inputs, task_overrides=task_overrides))
        adapter.set_display_name(f"finetune {name}")
        merged = place.accelerate(merge_lora(adapter_uri=adapter.outputs["Output"], **settings))
        models[name] = merged.set_display_name(f"merge {name}").outputs["Output"]

    judged = place.accelerate(
        evaluate(
            data_uri=data.outputs["Output"],
            model_uri=models["with HACL"],
            baseline_uri=models["without HACL"],
            **settings,
        )
    ).set_display_name("evaluate")

    promoted = place.connect(
        promote(
            model_uri=models["with HACL"],
            evaluation_uri=judged.outputs["Output"],
            registered_model=registered_model,
            **settings,
        )
    )
    promoted.set_caching_options(False).set_display_name("promote")

    deployed = place.connect(
        deploy(
            data_uri=data.outputs["Output"],
            promotion_uri=promoted.outputs["Output"],
            registered_model=registered_model,
            **settings,
        )
    )
    deployed.set_caching_options(False).set_display_name("deploy")

    return Outputs(
        model_uri=models["with HACL"],
        evaluation_uri=judged.outputs["Output"],
        promotion_uri=promoted.outputs["Output"],
        deployment_uri=deployed.outputs["Output"],
    )
