"""Questions about pictures in the published files of VQAv2, OK-VQA, TextVQA and VizWiz.

    VQAv2, OK-VQA   {"questions": [{"question_id", "image_id", "question"}]} and, in a second file,
                    {"annotations": [{"question_id", "answers": [{"answer"}], "answer_type"}]};
                    pictures are COCO_val2014_000000000042.jpg or 42.jpg
    TextVQA         {"data": [{"question_id", "image_id", "question", "answers": [text]}]}, pictures IMAGE_ID.jpg
    VizWiz          [{"image", "question", "answers": [{"answer"}], "answer_type"}]

Which of them a file is follows from its content. Files without answers (test sets) give questions without answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.pairs.caption_files import need
from .annotation_files import PictureFolder, choose_file, read_json
from .few_shot import Sample


@dataclass(frozen=True)
class Questions:
    """Samples with the ids under which their answers are handed in.

    Attributes:
        kind: ``vqa`` (VQAv2, OK-VQA), ``textvqa`` or ``vizwiz``.
        samples: fields ``question``.
        ids: ``question_id``, or VizWiz's ``image``.
    """

    kind: str
    samples: list[Sample]
    ids: list[int | str]


def find_questions(
    data: str | Path, split: str, questions: str | None, annotations: str | None, images: str | None
) -> Questions:
    """Read the questions of a split.

    Args:
        data: folder with the annotation files and, below it, the pictures; or one annotation file.
        split: word in the names of the files.
        questions, annotations: the files themselves, where ``data`` alone does not say them.
        images: folder of the pictures; ``data``'s otherwise.

    Raises:
        FileNotFoundError, ValueError: files are missing, ambiguous, damaged or of another format.
    """
    root = Path(data)
    if not root.exists():
        raise FileNotFoundError(f"data={data} does not exist; give a folder with the data set's JSON files.")
    asked, answered = (None if name is None else Path(name) for name in (questions, annotations))
    folder = root if root.is_dir() else root.parent
    if asked is None and root.is_file():
        asked = root
    if asked is None:
        asked = choose_file(root, split, ["question"], ["annotation"], "questions")
        if asked is not None and answered is None:
            answered = choose_file(root, split, ["annotation"], ["question"], "annotations")
        elif asked is None:
            asked = choose_file(root, split, [], ["annotation"], "questions")
    if asked is None:
        raise ValueError(
            f"{root} holds no JSON file of questions whose name has {split!r}; give task.split=NAME, or "
            "task.questions=FILE and task.annotations=FILE."
        )
    return read_questions(asked, answered, PictureFolder(folder if images is None else images))


def read_questions(questions: Path, annotations: Path | None, pictures: PictureFolder) -> Questions:
    """Read one data set.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or of another format.
    """
    content = read_json(questions)
    if isinstance(content, list):
        return _vizwiz(content, str(questions), pictures)
    if isinstance(content, dict) and "questions" in content:
        return _vqa(content, questions, annotations, pictures)
    if isinstance(content, dict) and "data" in content:
        return _textvqa(content, str(questions), pictures)
    keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise ValueError(
        f"{questions} is of no known format (it holds {keys[:100]}); expected 'questions' of VQAv2 or OK-VQA, 'data' "
        "of TextVQA, or VizWiz's list."
    )


def _vqa(content: Any, path: Path, annotations: Path | None, pictures: PictureFolder) -> Questions:
    answers: dict[int | str, Any] = {}
    if annotations is not None:
        listed = need(read_json(annotations), "annotations", list, str(annotations))
        for number, entry in enumerate(listed):
            where = f"{annotations}, annotation {number}"
            key = need(entry, "question_id", (int, str), where)
            if key in answers:
                raise ValueError(f"{where}: question_id {key} occurs twice; each question is annotated once.")
            answers[key] = (_answers(entry, where), str(entry.get("answer_type") or ""))
    subtype = str(content.get("data_subtype") or "")
    samples, ids = [], []
    for number, entry in enumerate(need(content, "questions", list, str(path))):
        where = f"{path}, question {number}"
        key = need(entry, "question_id", (int, str), where)
        image = need(entry, "image_id", (int, str), where)
        text = need(entry, "question", str, where)
        if annotations is not None and key not in answers:
            raise ValueError(
                f"{where}: question_id {key} has no annotation in {annotations}; give the file of this split."
            )
        given, group = answers.get(key, ([], ""))
        names = [str(image)]
        if isinstance(image, int):
            long = f"{image:012d}"
            places = dict.fromkeys((subtype, "val2014", "train2014", "test2015"))
            names = [*(f"COCO_{place}_{long}" for place in places), long, str(image)]
        samples.append(_sample(str(key), pictures.find(*names), text, given, group))
        ids.append(key)
    return _checked("vqa", samples, ids, path)


def _textvqa(content: Any, path: str, pictures: PictureFolder) -> Questions:
    samples, ids = [], []
    for number, entry in enumerate(need(content, "data", list, path)):
        where = f"{path}, question {number}"
        key = need(entry, "question_id", (int, str), where)
        image = need(entry, "image_id", (int, str), where)
        answers = _answers(entry, where) if "answers" in entry else []
        samples.append(
            _sample(str(key), pictures.find(str(image)), need(entry, "question", str, where), answers, "")
        )
        ids.append(key)
    return _checked("textvqa", samples, ids, path)


def _vizwiz(content: list[Any], path: str, pictures: PictureFolder) -> Questions:
    samples, ids = [], []
    for number, entry in enumerate(content):
        where = f"{path}, question {number}"
        image = need(entry, "image", str, where)
        answers = _answers(entry, where) if "answers" in entry else []
        text, group = need(entry, "question", str, where), str(entry.get("answer_type") or "")
        samples.append(_sample(image, pictures.find(image), text, answers, group))
        ids.append(image)
    return _checked("vizwiz", samples, ids, path)


def _answers(entry: Any, where: str) -> list[str]:
    """Texts of ``answers``, which are texts or objects with ``answer``."""
    listed = need(entry, "answers", list, where)
    texts = [
        answer if isinstance(answer, str) else need(answer, "answer", str, f"{where}, answer {place}")
        for place, answer in enumerate(listed)
    ]
    if not texts:
        raise ValueError(f"{where}: 'answers' is empty, expected the answers that people gave.")
    return texts


def _sample(name: str, image: Path | None, question: str, answers: Sequence[str], group: str) -> Sample:
    # The most frequent answer is the one an example shows; of equally frequent ones the first.
    shown = Counter(answers).most_common(1)[0][0] if answers else ""
    return Sample(name, image, {"question": question}, tuple(answers), shown, group)


def _checked(kind: str, samples: list[Sample], ids: list[int | str], path: str | Path) -> Questions:
    if not samples:
        raise ValueError(f"{path} holds no questions.")
    if len(set(ids)) != len(ids):
        twice = next(key for key, count in Counter(ids).items() if count > 1)
        raise ValueError(f"{path} asks question {twice} twice; each id may occur once.")
    return Questions(kind, samples, ids)
