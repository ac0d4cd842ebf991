"""Which training recipe makes a preset's model hallucinate less: plain, HACL, preference, over several seeds.

    python -m tests.bench.efficacy --preset nano --seeds 0 1 2 --output docs/efficacy

A recipe is a set of overrides of the preset. Every seed is a study of its own, data included, so the spread is over
data, weights and order. Stages are reused by their fingerprints below SHELLV_HOME: a killed study goes on, and a new
recipe costs what is new in it. Written are OUTPUT.json (every figure of every seed) and OUTPUT.md (means with 95 %
t-intervals, and differences to the plain recipe, paired by seed); what OUTPUT.json holds already stays.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from shellv_core.config import nearest
from shellv_core.errors import ConfigError
from shellv_core.stages.presets import stage_config, stage_module
from shellv_core.stages.runner import StageResult, code_digest
from shellv_core.storage import home

TRAINING_STAGES = ("pretrain_projector", "finetune")
PLAIN = "plain"
#: What the figures depend on.
CODE = ("data", "evaluation", "models", "stages", "training", "templates.py")
#: recipe -> seed -> record, as `train_and_judge` returns it
Study = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Recipe:
    """What is set beside the preset, and whether steps are added until training takes as long as another recipe's."""

    overrides: tuple[str, ...] = ()
    as_long_as: str | None = None


STAGE_1, STAGE_2 = "pretrain_projector.hacl", "finetune.hacl"
NO_OBJECTIVES = (f"{STAGE_1}.weight=0", f"{STAGE_2}.weight=0", "finetune.preference.weight=0")


def hacl(*stages: str, weight: float = 0.1, **settings: object) -> tuple[str, ...]:
    """Overrides that switch HACL on in `stages` alone."""
    values = {"weight": weight, **settings}
    return (*NO_OBJECTIVES, *(f"{stage}.{key}={value}" for stage in stages for key, value in values.items()))


def preference(**settings: object) -> tuple[str, ...]:
    """Overrides that switch the preference objective on; its prompt is the one that the captions answer in training."""
    values = {"weight": 0.2, "beta": 0.5, "prompt": "Describe the image in detail.", **settings}
    return tuple(f"finetune.preference.{key}={value}" for key, value in values.items())


#: Conversations that list what is seen are short: twice the steps take as long.
CAPTION_TASKS = "finetune.training.tasks=[description, detail, list]"
CAPTIONS = (CAPTION_TASKS, "finetune.training.max_steps=600")
RECIPES: dict[str, Recipe] = {
    PLAIN: Recipe(NO_OBJECTIVES),
    "HACL in stage 2": Recipe(hacl(STAGE_2)),
    "HACL in stage 2, paired negatives": Recipe(hacl(STAGE_2, negatives="paired")),
    "plain, as long as HACL in stage 2": Recipe(NO_OBJECTIVES, as_long_as="HACL in stage 2"),
    "preference": Recipe((*NO_OBJECTIVES, *preference())),
    "HACL in stage 2 and preference": Recipe((*hacl(STAGE_2), *preference())),
    "captions in stage 2": Recipe((*NO_OBJECTIVES, *CAPTIONS)),
    "captions and preference in stage 2": Recipe((*NO_OBJECTIVES, *CAPTIONS, *preference())),
    "HACL in stage 1": Recipe(hacl(STAGE_1)),
    "HACL in both stages": Recipe(hacl(STAGE_1, STAGE_2)),
    "plain, as long as HACL in stage 1": Recipe(NO_OBJECTIVES, as_long_as="HACL in stage 1"),
}
#: Tried on one seed, to choose the weights and tasks of `RECIPES`.
SEARCH: dict[str, Recipe] = {
    "HACL in stage 2, weight 0.5": Recipe(hacl(STAGE_2, weight=0.5)),
    "HACL in stage 2, weight 0.5, paired, no heads, queue": Recipe(
        hacl(STAGE_2, weight=0.5, heads="none", negatives="paired", queue_size=4096)
    ),
    "HACL in stage 1, weight 0.5": Recipe(hacl(STAGE_1, weight=0.5)),
    "preference, weight 1, beta 0.1": Recipe((*NO_OBJECTIVES, *preference(weight=1, beta=0.1))),
    "captions in stage 2, 300 steps": Recipe((*NO_OBJECTIVES, CAPTION_TASKS)),
}
ALL = {**RECIPES, **SEARCH}


@dataclass(frozen=True)
class Figure:
    """A column: an evaluate metric, in percent, and whether more of it is better (None: neither)."""

    name: str
    metric: str
    better: int | None = 1


MAIN = [
    Figure("POPE adversarial", "pope_adversarial_accuracy"),
    Figure("CHAIR i", "chair_instance_rate", -1),
    Figure("recall", "chair_recall"),
]
FIGURES = [
    Figure("POPE random", "pope_random_accuracy"),
    Figure("POPE popular", "pope_popular_accuracy"),
    MAIN[0],
    Figure("yes ratio", "pope_random_yes_ratio", None),
    *(Figure(f"Hal-Eval {kind}", f"hal_eval_{kind}_accuracy") for kind in ("object", "attribute", "relation", "event")),
    MAIN[1],
    Figure("CHAIR s", "chair_sentence_rate", -1),
    MAIN[2],
]
#: Means over the last steps of the last stage that has them; margins are cosines, the rest shares.
DIAGNOSTICS = [
    ("retrieval accuracy", "retrieval_accuracy"),
    ("hallucination accuracy", "hallucination_accuracy"),
    *((f"margin {kind}", f"hallucination_margin_{kind}") for kind in ("object", "attribute", "relation", "event")),
    ("preference accuracy", "preference_accuracy"),
    ("generation loss", "generation_loss"),
]


def run_stages(preset: str, seed: int, overrides: Sequence[str], root_uri: str) -> dict[str, StageResult]:
    """Run prepare_data to evaluate, or take what is there: results by stage."""
    settings = [*overrides, f"seed={seed}"]
    results: dict[str, StageResult] = {}

    def run(stage: str, **sources: str) -> None:
        uris = {f"{key}_uri": results[source].output_uri for key, source in sources.items()}
        uris["output_uri"] = f"{root_uri}/{stage}/{{fingerprint}}"
        results[stage] = stage_module(stage).run(stage_config(preset, stage, settings, **uris))

    run("prepare_data")
    run("pretrain_projector", data="prepare_data")
    run("finetune", data="prepare_data", model="pretrain_projector")
    run("merge_lora", adapter="finetune")
    run("evaluate", data="prepare_data", model="merge_lora")
    return results


def train_and_judge(preset: str, seed: int, overrides: Sequence[str], root_uri: str) -> dict[str, Any]:
    """Run a recipe.

    Returns:
        ``overrides``; ``stages``: training stage -> `training_record`; ``figures``: evaluate's flat metrics.
    """
    results = run_stages(preset, seed, overrides, root_uri)
    return {
        "overrides": list(overrides),
        "stages": {
            name: training_record(results[name], stage_config(preset, name, overrides).training.global_batch_size)
            for name in TRAINING_STAGES
        },
        "figures": results["evaluate"].metrics,
    }


def training_record(result: StageResult, batch_size: int) -> dict[str, Any]:
    """Steps, metrics and the seconds that the steps took, from a stage's result.

    The seconds follow from the measured rate, which is that of the steps alone and outlives the process.
    """
    steps = int(result.details["num_steps"])
    seconds = steps * batch_size / result.metrics["samples_per_second"]
    return {"fingerprint": result.fingerprint, "steps": steps, "seconds": seconds, "metrics": result.metrics}


def overrides_as_long(plain: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """The overrides of the record `plain`, and so many steps that each stage takes as long as in the record `other`."""
    steps = []
    for name in TRAINING_STAGES:
        mine, theirs = plain["stages"][name], other["stages"][name]
        ratio = theirs["seconds"] / mine["seconds"]
        if mine["metrics"] != theirs["metrics"] and ratio > 1:
            steps.append(f"{name}.training.max_steps={round(mine['steps'] * ratio)}")
    return (*plain["overrides"], *steps)


def chosen_recipes(names: Sequence[str]) -> list[str]:
    """`names` and the recipes that they are compared with, in the order of `ALL`.

    Raises:
        ConfigError: for an unknown name, with the nearest.
    """
    for name in names:
        if name not in ALL:
            raise ConfigError(f"unknown recipe {name!r}; {nearest(name, ALL)}")
    needed = {PLAIN, *names, *(ALL[name].as_long_as for name in names)}
    return [name for name in ALL if name in needed]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval; nan for a single value."""
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def shown(values: Sequence[float]) -> bool:
    """Whether the interval leaves out 0; two values are too few to say, as they may be equal by chance."""
    mean, half = interval(values)
    return len(values) > 2 and abs(mean) > half


def differences(study: Study, left: str, right: str, metric: str) -> dict[str, float]:
    """`left` minus `right` in points, by the seeds that both have."""
    mine, theirs = study[left], study[right]
    return {
        seed: 100 * (mine[seed]["figures"][metric] - theirs[seed]["figures"][metric]) for seed in mine if seed in theirs
    }


def verdict(study: Study, left: str, right: str) -> str:
    """What `left` is better and worse at than `right`, as far as it is `shown`."""
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for figure in FIGURES:
        values = list(differences(study, left, right, figure.metric).values())
        if figure.better and shown(values):
            found["better" if statistics.mean(values) * figure.better > 0 else "worse"].append(figure.name)
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names) or "no difference shown"


def pairs(study: Study) -> list[tuple[str, str]]:
    """What is compared: every recipe with the plain one, and with the plain one that trained as long."""
    result = [(name, PLAIN) for name in study if name != PLAIN]
    return result + [(ALL[name].as_long_as or "", name) for name in study if ALL[name].as_long_as in study]


def tables(preset: str, study: Study) -> str:
    """The study as Markdown."""
    seeds = list(study[PLAIN])
    of = "mean ± half-width of the 95 % t-interval over the seeds" if len(seeds) > 1 else "one seed, no interval"
    return "\n\n".join(
        [
            f"Preset `{preset}`, seeds {', '.join(seeds)}; percent; {of}. Made by `python -m tests.bench.efficacy`.",
            "## Figures",
            markdown_table(
                ["recipe", "seeds", *(figure.name for figure in FIGURES)],
                [
                    [name, ", ".join(study[name]), *(_mean(study, name, each.metric) for each in FIGURES)]
                    for name in study
                ],
            ),
            "The same with shuffled pictures (blind):",
            markdown_table(
                ["recipe", *(figure.name for figure in MAIN)],
                [[name, *(_mean(study, name, f"blind_{figure.metric}") for figure in MAIN)] for name in study],
            ),
            "## Differences",
            "In points, paired by seed; bold where the interval of three seeds or more leaves out 0. CHAIR is better"
            " when it falls.",
            markdown_table(
                ["difference", *(figure.name for figure in FIGURES if figure.better)],
                [
                    [f"{left} - {right}", *(_difference(study, left, right, each) for each in FIGURES if each.better)]
                    for left, right in pairs(study)
                ],
            ),
            "Seed by seed:",
            markdown_table(
                ["difference", *(figure.name for figure in MAIN), "verdict"],
                [
                    [
                        f"{left} - {right}",
                        *(
                            " ".join(f"{value:+.1f}" for value in differences(study, left, right, each.metric).values())
                            for each in MAIN
                        ),
                        verdict(study, left, right)
                        if len(differences(study, left, right, MAIN[0].metric)) > 2
                        else "too few seeds",
                    ]
                    for left, right in pairs(study)
                ],
            ),
            "## Training",
            "Steps and seconds of each stage (mean over seeds; seconds as measured, and as a multiple of the plain"
            " recipe's), then means over the last 50 steps of finetuning, or of pretraining where only that has the"
            " figure: accuracies and retrieval in percent, margins as differences of cosines times 100.",
            markdown_table(
                ["recipe", "steps 1", "seconds 1", "steps 2", "seconds 2", "times plain", *(n for n, _ in DIAGNOSTICS)],
                [[name, *_training_cells(study, name)] for name in study],
            ),
            "## Settings",
            markdown_table(
                ["recipe", "overrides"],
                [[name, f"`{' '.join(next(iter(study[name].values()))['overrides'])}`"] for name in study],
            ),
        ]
    )


def _training_cells(study: Study, name: str) -> list[str]:
    records = list(study[name].values())
    cells = [
        f"{statistics.mean(record['stages'][stage][key] for record in records):.0f}"
        for stage in TRAINING_STAGES
        for key in ("steps", "seconds")
    ]
    mine, plain = (
        sum(each[seed]["stages"][stage]["seconds"] for seed in study[name] for stage in TRAINING_STAGES)
        for each in (study[name], study[PLAIN])
    )
    cells.append(f"{mine / plain:.2f}")
    for _, key in DIAGNOSTICS:
        values = [
            found[-1]
            for record in records
            if (
                found := [
                    record["stages"][s]["metrics"][key]
                    for s in TRAINING_STAGES
                    if key in record["stages"][s]["metrics"]
                ]
            )
        ]
        scale = 1 if key.endswith("loss") else 100
        cells.append(f"{scale * statistics.mean(values):.{3 if scale == 1 else 1}f}" if values else "")
    return cells


def _mean(study: Study, name: str, metric: str) -> str:
    return _with_interval([100 * record["figures"][metric] for record in study[name].values()], "")


def _difference(study: Study, left: str, right: str, figure: Figure) -> str:
    values = list(differences(study, left, right, figure.metric).values())
    text = _with_interval(values, "+")
    return f"**{text}**" if shown(values) else text


def _with_interval(values: Sequence[float], sign: str) -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.1f}" if math.isnan(half) else f"{mean:{sign}.1f} ± {half:.1f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its cells as they are."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def earlier_study(output: Path, preset: str) -> Study:
    """What OUTPUT.json holds of the same preset by the same code, so that a study can be made in parts."""
    path = output.with_suffix(".json")
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = content.get("preset") == preset and content.get("code") == code_digest(CODE)
    study: Study = content["study"] if same else {}
    return study


def write(output: Path, preset: str, study: Study) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    study = {name: dict(sorted(study[name].items())) for name in ALL if name in study}
    content = {"preset": preset, "code": code_digest(CODE), "study": study}
    output.with_suffix(".json").write_text(json.dumps(_rounded(content), indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(tables(preset, study) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and write its tables, anew after each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--recipes", nargs="+", default=list(RECIPES), metavar="NAME", help="names in RECIPES or SEARCH"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="STAGE.key=value", help="overrides for all recipes")
    parser.add_argument("--output", type=Path, default=Path("docs/efficacy"))
    options = parser.parse_args(argv)
    from shellv_core.logs import setup_logging

    setup_logging()
    names = chosen_recipes(options.recipes)
    root_uri = (home() / "efficacy").resolve().as_uri()
    study = earlier_study(options.output, options.preset)
    for name in names:
        recipe = ALL[name]
        overrides: Sequence[str] = [*recipe.overrides, *options.set]
        for index, seed in enumerate(map(str, options.seeds)):
            if recipe.as_long_as and index == 0:
                overrides = overrides_as_long(study[PLAIN][seed], study[recipe.as_long_as][seed])
            record = train_and_judge(options.preset, int(seed), overrides, root_uri)
            study.setdefault(name, {})[seed] = record
            write(options.output, options.preset, study)
            figures = ", ".join(f"{each.name} {100 * record['figures'][each.metric]:.1f}" for each in FIGURES)
            print(f"seed {seed}, {name}: {figures}", flush=True)
    print(options.output.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
