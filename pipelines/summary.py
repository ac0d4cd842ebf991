"""What a finished local run tells the person who started it."""

from __future__ import annotations

from pipelines.local import LocalRun


def summary(run: LocalRun) -> str:
    """The results, where the report lies, what was registered, what the served model said, and where time went."""
    from shellv_core.evaluation.table import render_table

    promotion, deployment = run.promotion.details, run.deployment.details
    version = promotion["version"]
    aliases = ["@candidate"] + (["@champion"] if promotion["champion_version"] == version else [])
    slowest = sorted(run.seconds.items(), key=lambda task: -task[1])
    rows = {
        "report": str(run.report_path),
        "model": f"{promotion['registered_model']} version {version} {' '.join(aliases)}, {promotion['model_uri']}",
        "verdict": promotion["decision"],
        "served": f"{deployment['model']} version {deployment['version']}",
        "question": deployment["question"],
        "answer": deployment["answer"],
        "time": f"{sum(run.seconds.values()):.0f} s: " + ", ".join(f"{name} {value:.0f}" for name, value in slowest),
        "serve it": deployment["serve"],
        "ask again": deployment["curl"],
    }
    width = max(map(len, rows))
    table = render_table(run.results)
    return "\n".join(["", table, *(f"{name:{width}}  {value}" for name, value in rows.items())])
