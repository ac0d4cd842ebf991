"""The served champion, asked one question."""

from kfp import dsl

from components.base import component


@component("control")
def deploy(
    data_uri: str,
    root_uri: str,
    preset: str,
    overrides: list[str],
    deployment: dsl.Output[dsl.Artifact],
    promotion_uri: str = "",
    registered_model: str = "",
    deploy_target: str = "",
) -> str:
    """Serve the champion and ask it one question.

    Args:
        data_uri: Output of prepare_data, which holds a picture to ask about.
        promotion_uri: Output of promote that this deployment follows; empty for none.
        registered_model: Name in the model registry; empty for what the settings say.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        deploy_target: local, service or kubernetes; empty for what the settings say.

    Returns:
        Output: URI of the record of the deployment.
        deployment: Where the record lies, question, answer, counts and lineage.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import deploy
    from shellv_core.stages.artifacts import write_reference
    from shellv_core.stages.presets import stage_config

    uris = {"data_uri": data_uri, "promotion_uri": promotion_uri, "output_uri": f"{root_uri}/deploy/{{fingerprint}}"}
    values = {**uris, "registered_model": registered_model, "target": deploy_target}
    result = deploy.run(stage_config(preset, "deploy", overrides, **values))
    write_reference(result, deployment)
    return result.output_uri
