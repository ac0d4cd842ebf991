"""The served champion, asked one question."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def deploy(
    data_uri: str,
    promotion_uri: str,
    registered_model: str,
    root_uri: str,
    preset: str,
    overrides: list[str],
    deployment: dsl.Output[dsl.Artifact],
) -> str:
    """Serve the champion and ask it one question.

    Args:
        data_uri: Output of prepare_data, which holds a picture to ask about.
        promotion_uri: Output of promote.
        registered_model: Name in the model registry.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.

    Returns:
        Output: URI of the record of the deployment.
    """
    from shellv_core.logs import setup_logging
    from shellv_core.stages import deploy
    from shellv_core.stages.artifacts import write_reference
    from shellv_core.stages.presets import stage_config

    setup_logging()
    uris = {"data_uri": data_uri, "promotion_uri": promotion_uri, "output_uri": f"{root_uri}/deploy/{{fingerprint}}"}
    result = deploy.run(stage_config(preset, "deploy", overrides, **uris, registered_model=registered_model))
    write_reference(result, deployment)
    return result.output_uri
