"""Models that judge other models' answers.

A judge is any `AnswerGenerator`: an endpoint, a local model. Its words are journalled like answers, so that a killed
run continues; where it fails, an answer stays unjudged, and is counted and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.evaluation.answers import AnswerGenerator, Prompt, answer_all
from shellv_core.evaluation.benchmark import Question


class Judge:
    """What a benchmark calls with its questions about answers; asks each once, also over a kill.

    Args:
        generator: the model that judges.
        images: image name -> encoded file, for questions that show one.
        log_path: journal of the raw judgments.
        max_new_tokens: how long a judgment may be.

    Attributes:
        rows: every question with what the judge said to it, or why it said nothing.
    """

    def __init__(
        self,
        generator: AnswerGenerator,
        images: Mapping[str, bytes],
        log_path: Path,
        max_new_tokens: int = 512,
    ) -> None:
        self.generator, self._images, self._log_path = generator, images, log_path
        self._max_new_tokens = max_new_tokens
        self.rows: list[dict[str, Any]] = []

    def __call__(self, questions: Sequence[Question]) -> dict[str, str]:
        """The judge's words by question id; what it could not judge is left out.

        Raises:
            EvaluationError: if an image is missing.
        """
        prompts = {each.question_id: Prompt(each.image, each.prompt, self._max_new_tokens) for each in questions}
        answered = answer_all(
            list(dict.fromkeys(prompts.values())),
            self.generator,
            self._images,
            self._log_path,
            description="judgments",
        )
        for question_id, prompt in prompts.items():
            said = answered.texts.get(prompt)
            outcome = {"fault": answered.faults.get(prompt, "")} if said is None else {"text": said}
            self.rows.append({"question_id": question_id, "image": prompt.image, "prompt": prompt.text, **outcome})
        return {key: answered.texts[prompt] for key, prompt in prompts.items() if prompt in answered.texts}
