"""A tiny question file of each benchmark, in its authors' format, with answers and the scores worked out by hand."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEOPLE = ["red", "red", "red", "red", "blue", "blue", "blue", "green", "green", "teal"]


@dataclass(frozen=True)
class Sample:
    """Files by name (the first is the question file), answer rows, and expected scores by dotted path."""

    name: str
    files: dict[str, Any]
    rows: list[dict[str, Any]]
    expected: dict[str, float]
    outcomes: dict[str, float] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    def questions(self, folder: Path) -> Path | None:
        """Write the files; the question file's path."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        first = next(iter(self.files), None)
        return None if first is None else folder / first.split("/")[0]

    def options(self, folder: Path) -> list[str]:
        """Further arguments; those that are no flags are files of the folder."""
        return [each if each.startswith("--") else str(folder / each) for each in self.arguments]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def people(answers: list[str]) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, start=1)]


POPE = Sample(
    "pope",
    {
        "coco_pope_popular.json": lines(
            [
                {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
                {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
                {"question_id": 3, "image": "b.jpg", "text": "Is there a cup in the image?", "label": "yes"},
                {"question_id": 4, "image": "b.jpg", "text": "Is there a bus in the image?", "label": "no"},
            ]
        )
    },
    [
        {"question_id": 1, "text": "Yes, there is."},
        {"question_id": 2, "text": "NO"},
        {"question_id": 3, "text": "There isn't a cup."},
        {"question_id": 4, "text": "Maybe"},
    ],
    # By the authors' rule all four are a yes.
    {
        "accuracy": 2 / 4,
        "num_unparsed": 1,
        "yes_ratio": 1 / 4,
        "author_rule.yes_ratio": 1,
        "author_rule.accuracy": 1 / 2,
    },
    {"pope_popular_accuracy": 2 / 4},
)

_ITEM = {
    "image": "val2014/1.jpg",
    "caption": "a dog ",
    "hal_caption": [
        {"type": f"{name} Hallucination", "caption": f"a false {name}", "from": "gpt-4"}
        for name in ("Spatial Relationship", "Objective", "Attributive", "Event")
    ],
}
HAL_EVAL = Sample(
    "hal-eval",
    {"in_domain.json": [_ITEM]},
    [
        {"question_id": f"val2014/1.jpg/{kind}", "text": text}
        for kind, text in (
            ("gt", "I know it matches"),
            ("relation", "no"),
            ("object", "yes"),
            ("attribute", "No, it does not"),
            ("event", "Another match"),
        )
    ],
    # Strict: gt says neither. Authors: "know" and "another" hold a no.
    {
        "relation.accuracy": 1 / 2,
        "relation.num_unparsed": 1,
        "object.accuracy": 0,
        "event.num_unparsed": 2,
        "event.author_rule.accuracy": 1 / 2,
        "event.author_rule.num_unparsed": 0,
    },
    {"hal_eval_object_accuracy": 0, "hal_eval_relation_accuracy": 1 / 2},
)

HAL_EVAL_GENERATIVE = Sample(
    "hal-eval-generative",
    {"in_domain.json": [{"image": f"{number}.jpg"} for number in range(4)]},
    [
        {"image": "0.jpg", "predict": "x", "first_answer": "Yes, there is", "second_answer": "Object and Relationship"},
        {"image": "1.jpg", "predict": "x", "first_answer": "yes", "second_answer": "aditional"},
        {"image": "2.jpg", "predict": "x", "first_answer": "No"},
        {"image": "3.jpg", "predict": "x", "first_answer": "Hard to tell"},
    ],
    # Authors: only Yes with a capital counts, all else is a No.
    {
        "accuracy": 1 / 3,
        "hallucination_rate": 2 / 3,
        "num_unparsed": 1,
        "type_shares.object": 1 / 2,
        "type_shares.relation": 1 / 2,
        "type_shares.attribute": 0,
        "type_shares.event": 1 / 2,
        "author_rule.accuracy": 3 / 4,
        "author_rule.type_shares.object": 1,
    },
    {"hal_eval_generative_accuracy": 1 / 3},
)

AMBER = Sample(
    "amber",
    {
        "query_all.json": [
            {"id": 1, "image": "1.jpg", "query": "Describe this image."},
            {"id": 2, "image": "1.jpg", "query": "Is the sky sunny?"},
            {"id": 3, "image": "1.jpg", "query": "Is there a dog?"},
            {"id": 4, "image": "1.jpg", "query": "Does it touch?"},
        ],
        "annotations.json": [
            {"id": 1, "type": "generative", "truth": ["road", "path", "TV", "sign"], "hallu": ["dog", "sea"]},
            {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
            {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
            {"id": 4, "type": "relation", "truth": "no"},
        ],
        "relation.json": {
            "road": ["path", "street"],
            "path": [],
            "TV": [],
            "sign": [],
            "dog": [],
            "sea": [],
            "cat": ["kitten"],
        },
        "safe_words.txt": "sign\nindividual",
    },
    [
        {"id": 1, "response": "Paths, a tv, a sign, two dogs and a cat; trees."},
        {"id": 2, "response": "Yes"},
        {"id": 3, "response": "No, there is no dog."},
        {"id": 4, "response": "Yes"},
    ],
    # Nouns path, TV, sign, dog, cat. Corrected: path, TV and sign are covered, dog and cat hallucinated. Authors: the
    # path is the road's, and the sign is safe and never covered.
    {
        "generative.chair": 40,
        "generative.cover": 75,
        "generative.hal": 100,
        "generative.cog": 50,
        "generative.author_rule.chair": 40,
        "generative.author_rule.cover": 50,
        "generative.author_rule.cog": 50,
        "discriminative.all.accuracy": 2 / 3,
        "discriminative.all.precision": 1,
        "discriminative.all.recall": 1 / 2,
        "discriminative.all.f1": 2 / 3,
        "discriminative.attribute_state.accuracy": 1,
        "discriminative.relation.recall": 0,
        # Only "Yes" to the first question is right: 1 / 3.001.
        "discriminative.all.author_rule.accuracy": 33.3,
        "discriminative.existence.author_rule.f1": 0,
        "amber_score": (100 - 40 + 200 / 3) / 2,
    },
    {"amber_chair": 2 / 5, "amber_cover": 3 / 4, "amber_accuracy": 2 / 3},
)

CHAIR = Sample(
    "chair",
    {
        "instances_val2014.json": {
            "images": [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in (42, 7)],
            "annotations": [{"id": 1, "image_id": 42, "category_id": 18}, {"id": 2, "image_id": 7, "category_id": 3}],
            "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        },
        "captions_val2014.json": {"annotations": [{"id": 1, "image_id": 42, "caption": "A puppy on a bed."}]},
    },
    [
        {"image_id": 42, "caption": "A dog and a cat on a bed."},
        {"image_id": 7, "caption": "A car, and a truck, a truck."},
    ],
    # Mentions dog cat bed car truck truck; cat and both trucks are not there.
    {"instance_rate": 3 / 6, "sentence_rate": 1, "recall": 3 / 3},
    {"chair_instance_rate": 3 / 6, "chair_sentence_rate": 1, "chair_recall": 3 / 3},
    ("--captions", "captions_val2014.json"),
)

MMHAL = Sample(
    "mmhal",
    {
        "responses.json": [
            {
                "question_type": kind,
                "image_id": f"i{number}",
                "image_src": f"https://x/{number}.jpg",
                "image_content": ["dog", "ball"],
                "question": "What is it?",
                "gt_answer": "A dog.",
                "model_answer": "A {cat}.",
            }
            for number, kind in enumerate(("attribute", "adversarial", "attribute"))
        ]
    },
    [
        {"question_id": 0, "text": "It is right.\nRating: 5, very informative"},
        {"question_id": 1, "text": "**Rating**: 2"},
        {"question_id": 2, "text": "Good"},
    ],
    # Authors: "rating: 5", and twice nothing that they read.
    {
        "mean_score": 7 / 2,
        "hallucination_rate": 1 / 2,
        "num_unparsed": 1,
        "mean_by_type.attribute": 5,
        "author_rule.mean_score": 5 / 3,
        "author_rule.hallucination_rate": 2 / 3,
        "author_rule.mean_by_type.attribute": 5 / 2,
    },
    {"mmhal_score": 7 / 12, "mmhal_hallucination_rate": 1 / 2},
)

QA_REVIEW = Sample(
    "qa-review",
    {},
    [
        {"question_id": 0, "category": "conv", "content": "8 6\nx", "tuple": [8.0, 6.0]},
        {"question_id": 1, "category": "conv", "content": "8, 9\nx", "tuple": [-1, -1]},
        {"question_id": 2, "category": "detail", "content": "7 7\nx", "tuple": [7, 7]},
        {"question_id": 3, "category": "detail", "content": "I cannot say.", "tuple": [-1, -1]},
    ],
    # "8, 9" has two spaces once its comma is one, which the authors' rule does not split.
    {
        "all.mean_first": 23 / 3,
        "all.mean_second": 22 / 3,
        "all.relative_score": 95.7,
        "all.win": 1,
        "all.tie": 1,
        "all.loss": 1,
        "all.num_unparsed": 1,
        "conv.relative_score": 93.8,
        "detail.num_unparsed": 1,
        "conv.author_rule.mean_first": 3.5,
        "conv.author_rule.relative_score": 71.4,
    },
    {"qa_review_relative_score": 22 / 23},
)

SCIENCEQA = Sample(
    "scienceqa",
    {
        "problems.json": {
            key: {
                "question": "Which?",
                "choices": ["ant", "elephant", "whale"][:size],
                "answer": answer,
                "hint": hint,
                "image": image,
                "grade": grade,
                "subject": subject,
                "split": split,
            }
            for key, size, answer, hint, image, grade, subject, split in (
                ("1", 2, 1, "", "image.png", "grade3", "natural science", "test"),
                ("2", 3, 2, "Read this.", None, "grade7", "language science", "test"),
                ("3", 2, 0, "", None, "grade12", "social science", "test"),
                ("4", 2, 0, "x", "image.png", "grade6", "natural science", "test"),
                ("5", 2, 0, "x", "image.png", "grade6", "natural science", "train"),
            )
        }
    },
    [
        {"question_id": "1", "text": "(B)"},
        {"question_id": "2", "text": "C. whale"},
        {"question_id": "3", "text": "C"},
        {"question_id": "4", "text": "The answer is A."},
    ],
    # "(B)" is no answer to the authors; C is none of the third's choices.
    {
        "accuracy": 3 / 4,
        "image_accuracy": 1,
        "num_unparsed": 1,
        "by_group.NAT": 1,
        "by_group.SOC": 0,
        "by_group.LAN": 1,
        "by_group.IMG": 1,
        "by_group.TXT": 1,
        "by_group.NO": 0,
        "by_group.G1-6": 1,
        "by_group.G7-12": 1 / 2,
        "author_rule.accuracy": 2 / 4,
        "author_rule.image_accuracy": 1 / 2,
    },
    {"scienceqa_accuracy": 3 / 4},
)

TEXTVQA = Sample(
    "textvqa",
    {
        "TextVQA_0.5.1_val.json": {
            "data": [
                {"question_id": 34602, "image_id": "003a", "question": "What brand?", "answers": PEOPLE},
                {"question_id": 34603, "image_id": "003a", "question": "What else?", "answers": PEOPLE},
                {"question_id": 34604, "image_id": "004b", "question": "What else?", "answers": ["nothing"] * 10},
            ]
        }
    },
    [
        {
            "question_id": "003a",
            "prompt": "What else?\nReference OCR token: a\nAnswer the question.",
            "text": "The Green.",
        },
        {"question_id": "003a", "prompt": "What brand?\nAnswer the question.", "text": "Blue"},
        {"question_id": 34604, "text": "Nothing!"},
    ],
    # Two that agree give 0.6, three 0.9, ten 1; "nothing!" loses its mark, "the green." its article and period.
    {"accuracy": (0.6 + 0.9 + 1) / 3},
    {"textvqa_accuracy": (0.6 + 0.9 + 1) / 3},
)

VQAV2 = Sample(
    "vqav2",
    {
        "questions.json": {
            "data_subtype": "val2014",
            "questions": [{"question_id": number, "image_id": 9, "question": "What?"} for number in (1, 2, 3, 4)],
        },
        "annotations.json": {
            "annotations": [
                {"question_id": 1, "answer_type": "other", "answers": people(PEOPLE)},
                {"question_id": 2, "answer_type": "number", "answers": people(["2"] * 10)},
                {"question_id": 3, "answer_type": "number", "answers": people(["2"] * 9 + ["3"])},
                {"question_id": 4, "answer_type": "other", "answers": people(["yes"] * 10)},
            ]
        },
    },
    [
        {"question_id": 1, "text": "the teal"},
        {"question_id": 2, "text": "two"},
        {"question_id": 3, "text": "two"},
        {"question_id": 4, "text": "YES"},
    ],
    # One of ten agrees: 0.3. Where all people agree nothing is normalised but the case: "two" is not "2" there.
    {"accuracy": (0.3 + 0 + 1 + 1) / 4, "by_group.number": 1 / 2, "by_group.other": 0.65},
    {"vqav2_accuracy": (0.3 + 0 + 1 + 1) / 4},
    ("--annotations", "annotations.json"),
)

GQA = Sample(
    "gqa",
    {
        "testdev_balanced_questions.json": {
            "20": {"imageId": "n1", "question": "Which side?", "answer": "left", "types": {"structural": "choose"}},
            "21": {"imageId": "n1", "question": "Who?", "answer": "man", "types": {"structural": "query"}},
            "22": {"imageId": "n2", "question": "What?", "answer": "dog", "types": {"structural": "query"}},
        }
    },
    [
        {"question_id": "20", "text": "Left."},
        {"questionId": "21", "prediction": "a man"},
        {"question_id": "22", "text": "Dog"},
    ],
    {"accuracy": 2 / 3, "by_group.binary": 1, "by_group.open": 1 / 2, "by_group.query": 1 / 2},
    {"gqa_accuracy": 2 / 3},
)

VIZWIZ = Sample(
    "vizwiz",
    {
        "val.json": [
            {"image": "v1.jpg", "question": "What?", "answer_type": "other", "answers": people(PEOPLE)},
            {
                "image": "v2.jpg",
                "question": "What?",
                "answer_type": "unanswerable",
                "answers": people(["unanswerable"] * 10),
            },
        ]
    },
    [{"image": "v1.jpg", "answer": "red"}, {"image": "v2.jpg", "answer": "Unanswerable"}],
    {"accuracy": 1, "by_group.unanswerable": 1, "num_missing": 0},
    {"vizwiz_accuracy": 1},
)

MMBENCH = Sample(
    "mmbench",
    {
        "dev.tsv": "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
        '7\tWhich?\t"two\nlines"\tant\tbee\tcat\t\tB\tlogic\taW1hZ2U=\n'
        "8\tHow many?\t\tone\ttwo\t\t\tA\tcount\taW1hZ2U=\n"
    },
    [
        # The right choice moves one letter up with each rotation.
        {"question_id": 7, "round_id": 0, "text": "B"},
        {"question_id": 7, "round_id": 1, "text": "A. bee"},
        {"question_id": 7, "round_id": 2, "text": "bee"},
        {"question_id": 8, "text": "A"},
        {"question_id": 8, "round_id": 1, "text": "A"},
    ],
    {
        "circular_accuracy": 1 / 2,
        "accuracy": 1,
        "circular_by_category.logic": 1,
        "circular_by_category.count": 0,
        "num_questions": 2,
        "num_rotations": 5,
    },
    {"mmbench_circular_accuracy": 1 / 2},
)

MME = Sample(
    "mme",
    {
        "mme/existence.txt": "1.jpg\tIs there a dog?\tYes\n1.jpg\tIs there a cat?\tNo\n"
        "2.jpg\tIs there a cup?\tYes\n2.jpg\tIs there a bus?\tNo\n",
        "mme/code_reasoning.txt": "1.png\tIs it one?\tYes\n1.png\tIs it two?\tNo\n",
    },
    [
        {"question_id": "existence/1.jpg", "prompt": "Is there a dog?\nAnswer briefly.", "text": "Yes"},
        {"question_id": "existence/1.jpg", "prompt": "Is there a cat?\nAnswer briefly.", "text": "No"},
        {"question_id": "existence/2.jpg#1", "text": "Yes"},
        {"question_id": "existence/2.jpg#2", "text": "Yes"},
        {"question_id": "code_reasoning/1.png#1", "text": "It is: yes"},
        {"question_id": "code_reasoning/1.png#2", "text": "no"},
    ],
    # The authors read the first four letters alone.
    {
        "perception": 75 + 50,
        "cognition": 200,
        "by_task.existence.accuracy": 3 / 4,
        "by_task.existence.accuracy_plus": 1 / 2,
        "author_rule.cognition": 50,
    },
    {"mme_accuracy": 5 / 6},
)

SEED = Sample(
    "seed-bench",
    {
        "SEED-Bench.json": {
            "question_type": {"Scene Understanding": 1, "Action Recognition": 10},
            "questions": [
                {
                    "question_id": key,
                    "question": "What?",
                    **{f"choice_{letter}": f"{letter} thing" for letter in "abcd"},
                    "answer": "C",
                    "data_id": data,
                    "data_type": kind,
                    "question_type_id": type_id,
                }
                for key, data, kind, type_id in (("1", "9_9", "image", 1), ("2", "v.webm", "video", 10))
            ],
        }
    },
    [{"question_id": "1", "text": "C"}, {"question_id": "2", "prediction": "D"}],
    {"accuracy": 1 / 2, "by_group.image": 1, "by_group.video": 0, "by_group.Scene Understanding": 1},
    {"seed_bench_accuracy": 1 / 2},
)

SAMPLES = {
    sample.name: sample
    for sample in sorted(
        (
            POPE, HAL_EVAL, HAL_EVAL_GENERATIVE, AMBER, CHAIR, MMHAL, QA_REVIEW, SCIENCEQA, TEXTVQA, VQAV2, GQA, VIZWIZ,
            MMBENCH, MME, SEED,
        ),
        key=lambda sample: sample.name,
    )
}  # fmt: skip
