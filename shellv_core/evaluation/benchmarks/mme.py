"""MME: two yes/no questions about each image, in ten tasks of perception and four of cognition.

The questions are the files of the authors' eval_tool: a folder with one ``TASK.txt`` for each task, whose lines are
image, question and right answer between tabs; a fourth field is the model's answer. A question's id is ``TASK/IMAGE#1``
or ``#2``, in file order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Outcomes, Question, Scores
from shellv_core.evaluation.rows import check_overlap, index_texts, read_rows, read_text, row_id
from shellv_core.evaluation.yes_no import Label, parse_strict

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Mme:
    """MME's questions.

    Args:
        tasks: task -> its lines' fields: image, question, right answer.
        source: names the folder in errors.

    Raises:
        EvaluationError: if a task is unknown, a line is not right, or an image has not two questions.
    """

    key: tuple[str, ...] = ("mme",)
    max_new_tokens = 4

    def __init__(self, tasks: Mapping[str, Sequence[Sequence[str]]], source: str = "questions") -> None:
        questions = []
        self._truth: dict[str, bool] = {}
        self._images: dict[str, dict[str, list[str]]] = {}
        for task, lines in tasks.items():
            if task not in PERCEPTION + COGNITION:
                raise EvaluationError(
                    f"{source}: {task!r} is no task of MME; there are: {', '.join(PERCEPTION + COGNITION)}."
                )
            images = self._images.setdefault(task, {})
            for number, fields in enumerate(lines, start=1):
                if len(fields) < 3 or fields[2].strip().lower() not in ("yes", "no"):
                    raise EvaluationError(
                        f"{source}/{task}.txt, line {number}: needs image, question and Yes or No between tabs, got"
                        f" {list(fields)!r}."
                    )
                image, question, answer = fields[:3]
                of_image = images.setdefault(image, [])
                key = f"{task}/{image}#{len(of_image) + 1}"
                of_image.append(key)
                self._truth[key] = answer.strip().lower() == "yes"
                questions.append(Question(key, f"{task}/{image}", question))
            odd = next((image for image, keys in images.items() if len(keys) != 2), None)
            if odd is not None:
                raise EvaluationError(f"{source}/{task}.txt: image {odd!r} has {len(images[odd])} questions, not two.")
        if not questions:
            raise EvaluationError(f"{source} holds no task's file.")
        self._questions = tuple(questions)

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, task by task."""
        return self._questions

    def expected(self, question_id: str) -> str:
        """Yes or no."""
        return "yes" if self._truth[question_id] else "no"

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores by task and of both parts.

        Returns:
            perception and cognition (sums over their tasks), by_task with accuracy and accuracy_plus (images with both
            questions right) and their sum in percent, `score`; counts. A missing or unparsed answer is wrong.
            `author_rule` has the same by the authors' rule.
        """
        num_unknown = check_overlap(self._truth, answers)
        labels = {key: parse_strict(answers[key]) for key in self._truth if key in answers}
        author = {key: _parse_as_authors(answers[key]) for key in self._truth if key in answers}
        return {
            **self._sums(labels),
            "num_questions": len(self._truth),
            "num_unparsed": sum(label is None for label in labels.values()),
            "num_missing": len(self._truth) - len(labels),
            "num_unknown": num_unknown,
            "author_rule": self._sums(author),
        }

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Accuracy by the strict rule, per question of all tasks."""
        return {
            "mme_accuracy": {
                key: (int(key in answers and parse_strict(answers[key]) is label), 1)
                for key, label in self._truth.items()
            }
        }

    def read_answers(self, path: Path) -> dict[str, str]:
        """Answers by id: of rows with ids; of LLaVA's, whose question_id is ``TASK/IMAGE`` and whose prompt begins with
        the question; or of a folder as the authors' eval_tool takes it."""
        if path.is_dir():
            rows = [
                {"question_id": f"{task}/{fields[0]}", "prompt": fields[1], "text": fields[3]}
                for task, lines in read_tasks(path).items()
                for fields in lines
                if len(fields) >= 4
            ]
            if not rows:
                raise EvaluationError(f"{path}: no line of its files has a fourth field with an answer.")
        else:
            rows = read_rows(path)
        by_image: dict[str, list[Question]] = {}
        for each in self._questions:
            for name in {each.image, each.image.rpartition(".")[0]}:
                by_image.setdefault(name, []).append(each)
        named = []
        for number, row in enumerate(rows, start=1):
            key = row_id(row, number, str(path))
            if key not in self._truth:
                # Prompts may have a suffix.
                asked = str(row.get("prompt", "")).strip()
                ours = (each for each in by_image.get(key, ()) if asked.startswith(each.prompt.strip()))
                key = next((each.question_id for each in ours), key)
            named.append((key, row))
        return index_texts(named, str(path))

    def _sums(self, labels: Mapping[str, Label]) -> Scores:
        tasks: dict[str, dict[str, float]] = {}
        for task, images in self._images.items():
            right = [[labels.get(key) is self._truth[key] for key in keys] for keys in images.values()]
            accuracy = sum(map(sum, right)) / sum(map(len, right))
            plus = sum(map(all, right)) / len(right)
            tasks[task] = {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * (accuracy + plus)}
        return {
            "perception": sum(tasks[task]["score"] for task in PERCEPTION if task in tasks),
            "cognition": sum(tasks[task]["score"] for task in COGNITION if task in tasks),
            "by_task": tasks,
        }


def _parse_as_authors(text: str) -> Label:
    """The first four letters hold yes, else no, in any case."""
    head = text.strip().lower()[:4]
    return True if "yes" in head else False if "no" in head else None


def read_tasks(folder: Path) -> dict[str, list[list[str]]]:
    """Task -> fields of its lines, of the folder's ``TASK.txt`` files.

    Raises:
        EvaluationError: if it is no folder or has no such file.
    """
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise EvaluationError(
            f"{folder} is no folder of TASK.txt files; take eval_tool/Your_Results, which is published at"
            f" {ENTRIES[0].published}"
        )
    return {
        file.stem: [line.rstrip("\r").split("\t") for line in read_text(file).split("\n") if line.strip()]
        for file in files
    }


ENTRIES = (
    Entry(
        name="mme",
        summary="MME: two yes/no questions about each image, in fourteen tasks",
        questions="folder of TASK.txt files (eval_tool/Your_Results): image, question, right answer between tabs",
        answers="rows with TASK/IMAGE#1 or #2, LLaVA's with TASK/IMAGE and prompt, or a folder with 4th fields\n"
        '{"question_id": "code_reasoning/0020.png", "prompt": "Is a c++ code shown ...?", "text": "Yes"}',
        published="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation",
        metrics="perception and cognition; by task accuracy, accuracy+ and their sum",
        rules="authors: yes, then no, in the first four letters; strict: words, unparsed",
        open=lambda questions: Mme(read_tasks(questions), str(questions)),
        read=lambda benchmark, path: benchmark.read_answers(path),
    ),
)
