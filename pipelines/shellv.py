"""The pipeline from data to a served champion, with and without HACL."""

from kfp import dsl

from components.deploy.component import deploy
from components.evaluate.component import evaluate
from components.finetune.component import finetune
from components.merge_lora.component import merge_lora
from components.prepare_data.component import prepare_data
from components.pretrain_projector.component import pretrain_projector
from components.promote.component import promote
from pipelines.definition import Definition
from pipelines.guard import checked, reported
from pipelines.placement import Placement

WITHOUT_HACL = ["finetune.hacl.weight=0"]
STAGES = ("prepare_data", "pretrain_projector", "finetune", "merge_lora", "evaluate", "promote", "deploy")


def shellv(
    place: Placement,
    root_uri: str,
    preset: str = "nano",
    overrides: list[str] = [],  # noqa: B006 - kfp reads the literal
    registered_model: str = "",
    deploy_target: str = "kubernetes",
    train_nodes: int = 1,
    k8s_accelerator_gb: float = 0.0,
) -> None:
    """Train a vision-language model with and without HACL, judge both, promote the first if it passes, and serve it.

    Args:
        root_uri: Folder of all outputs, s3://BUCKET/PREFIX; each goes to a folder named after its content.
        preset: Settings of all stages.
        overrides: Single settings that differ from the preset, as STAGE.key=value.
        registered_model: Name in the model registry; empty for the preset's.
        deploy_target: Where the champion is deployed to; empty for what the settings say.
        train_nodes: Nodes that train together; above 1 with k8s_training_accelerators 0, as each training task then
            only waits for the pods that k8s_train_job describes.
        k8s_accelerator_gb: Memory of an accelerator in 10^9 bytes, held against what training needs; 0 for none.
    """
    settings = {"root_uri": root_uri, "preset": preset, "overrides": overrides}
    training = {"accelerator_gb": k8s_accelerator_gb, "nodes": train_nodes}
    launch = {"nodes": train_nodes, "pods": place.parameters["k8s_train_job"]}
    with dsl.ExitHandler(reported(place, root_uri), name="run"):
        checks = checked(place, STAGES, settings, training, deploy_target)
        own = checks.settings
        data = place(prepare_data(**own("prepare_data")), "prepare data").after(*checks.tasks).outputs["Output"]
        projector = place(
            pretrain_projector(data_uri=data, **own("pretrain_projector"), **launch), "pretrain projector"
        )
        inputs = {"data_uri": data, "model_uri": projector.outputs["Output"], **own("finetune"), **launch}

        models = {}
        for name, task_overrides in {"with HACL": [], "without HACL": WITHOUT_HACL}.items():
            adapter = place(finetune(**inputs, task_overrides=task_overrides), f"finetune {name}")
            merged = place(merge_lora(adapter_uri=adapter.outputs["Output"], **own("merge_lora")), f"merge {name}")
            models[name] = merged.outputs["Output"]

        judged = place(
            evaluate(
                data_uri=data,
                model_uri=models["with HACL"],
                baseline_uri=models["without HACL"],
                cache_salt=checks.cache_salt,
                **own("evaluate"),
            ),
            "evaluate",
        )
        promoted = place(
            promote(
                model_uri=models["with HACL"],
                evaluation_uri=judged.outputs["Output"],
                registered_model=registered_model,
                **own("promote"),
            ),
            "promote",
        )
        place(
            deploy(
                data_uri=data,
                promotion_uri=promoted.outputs["Output"],
                registered_model=registered_model,
                deploy_target=deploy_target,
                **own("deploy"),
            ),
            "deploy",
        )


SHELLV = Definition("shellv", "Shell-V: train, judge, promote, deploy", shellv, ("training", "evaluation"))
