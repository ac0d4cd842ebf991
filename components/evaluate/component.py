"""Answers, metrics and a report about a model, its blind run and its baseline."""

from kfp import dsl

from components.base import component


@component("train")
def evaluate(
    data_uri: str,
    model_uri: str,
    root_uri: str,
    preset: str,
    overrides: list[str],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    baseline_uri: str = "",
    cache_salt: str = "",
) -> str:
    """Judge a model against its blind run and its baseline, with a report.

    Args:
        data_uri: Output of prepare_data, with the benchmarks.
        model_uri: Output of merge_lora for the model in question.
        baseline_uri: Output of merge_lora for the model trained without HACL; empty for none.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        cache_salt: Read by no one; another text makes Kubeflow Pipelines look for another cached evaluation.

    Returns:
        Output: URI of the results, answers and report.
        evaluation: Where the evaluation lies, its hash, counts and lineage.
        metrics: Scores of the model, of its blind run and of the baseline.
        confusion: How the yes/no questions of one benchmark were answered; POPE before others.
        report: The report as one page.
        summary: The scores as a table.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import evaluate
    from shellv_core.stages.artifacts import write_confusion, write_file, write_metrics, write_reference
    from shellv_core.stages.presets import stage_config

    uris = {"data_uri": data_uri, "model_uri": model_uri, "baseline_uri": baseline_uri}
    uris["output_uri"] = f"{root_uri}/evaluate/{{fingerprint}}"
    result = evaluate.run(stage_config(preset, "evaluate", overrides, **uris))
    write_reference(result, evaluation)
    write_metrics(result, metrics)
    write_confusion(result, confusion)
    write_file(result, "report.html", report)
    write_file(result, "summary.md", summary)
    return result.output_uri
