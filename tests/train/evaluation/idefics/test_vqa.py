"""Visual questions: the official accuracy, the data sets' files, and whole runs on one and two ranks."""

import json
import random

import pytest
from interloom.train.cli import main
from interloom.train.evaluation.idefics.annotation_files import PictureFolder
from interloom.train.evaluation.idefics.vqa_answers import (
    agreement,
    normalise_answer,
    normalised_accuracy,
    official_accuracy,
)
from interloom.train.evaluation.idefics.vqa_data import find_questions, read_questions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Outputs of the data set's own code on the same texts.
        ("Two", "2"),
        ("none", "0"),
        ("The red   bus.", "red bus"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("1,000-dollar", "1000dollar"),
        ("hot-dog", "hot dog"),
        ("hot - dog", "hot dog"),
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("'ow'sat", "'ow's'at"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("U.S.", "us"),
        ("yes!\nno?", "yes no"),
        ("black/white", "black white"),
        ("$5 & up", "$5 & up"),
        ("its 10:30", "its 10:30"),
        ("the", ""),
        ("", ""),
        ("Im", "im"),
    ],
)
def test_known_normalisations(text, expected):
    assert normalise_answer(text) == expected


def test_agreement_is_the_mean_over_all_but_one():
    rng = random.Random(0)
    for _ in range(300):
        people = [rng.choice("abc") for _ in range(rng.randint(2, 10))]
        answer = rng.choice("abcd")
        each = []
        for left_out in range(len(people)):
            others = people[:left_out] + people[left_out + 1 :]
            each.append(min(1, sum(other == answer for other in others) / 3))
        assert agreement(answer, people) == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_the_official_accuracy_compares_raw_texts_where_people_agree():
    assert official_accuracy("Yes.", ["yes"] * 10) == 0.0
    assert normalised_accuracy("Yes.", ["yes"] * 10) == 1.0
    assert official_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert official_accuracy("2", ["two"] * 3 + ["3"] * 7) == pytest.approx(0.9)
    assert official_accuracy("cat", ["cat"]) == 1.0


def vqa_files(root, draw, split, count):
    """A tiny split in VQAv2's format."""
    questions, annotations = [], []
    for n in range(count):
        image = 100 * (1 + (split == "val")) + n
        draw(root / f"{split}2014" / f"COCO_{split}2014_{image:012d}.jpg", image)
        questions.append({"question_id": 10 * image, "image_id": image, "question": f"what is {n}?"})
        answers = [{"answer": ["red", "blue", "2"][(n + k // 6) % 3], "answer_id": k} for k in range(10)]
        kind = ["other", "yes/no"][n % 2]
        annotations.append({"question_id": 10 * image, "answers": answers, "answer_type": kind})
    names = {
        f"v2_OpenEnded_mscoco_{split}2014_questions.json": {
            "questions": questions,
            "data_subtype": f"{split}2014",
        },
        f"v2_mscoco_{split}2014_annotations.json": {"annotations": annotations},
    }
    for name, content in names.items():
        (root / name).write_text(json.dumps(content))
    return root


@pytest.fixture
def coco(tmp_path, draw):
    root = tmp_path / "vqa"
    root.mkdir()
    vqa_files(root, draw, "train", 4)
    return vqa_files(root, draw, "val", 5)


def test_files_of_vqav2(coco):
    found = find_questions(coco, "val", None, None, None)
    assert (found.kind, found.ids) == ("vqa", [2000, 2010, 2020, 2030, 2040])
    first = found.samples[0]
    assert first.image.name == "COCO_val2014_000000000200.jpg"
    assert first.answers == ("red",) * 6 + ("blue",) * 4
    assert (first.shown, first.group) == ("red", "other")


def test_files_of_textvqa_and_vizwiz(tmp_path, draw):
    draw(tmp_path / "train_images" / "abc.jpg", 1)
    entry = {"question_id": 7, "image_id": "abc", "question": "what?", "answers": ["a"] * 10}
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [entry]}))
    del entry["answers"]
    (tmp_path / "TextVQA_0.5.1_test.json").write_text(json.dumps({"data": [entry]}))
    found = find_questions(tmp_path, "val", None, None, None)
    assert (found.kind, found.ids, found.samples[0].image.name) == ("textvqa", [7], "abc.jpg")
    assert find_questions(tmp_path, "test", None, None, None).samples[0].answers == ()
    root = tmp_path / "vizwiz"
    draw(root / "val" / "VizWiz_val_00000000.jpg", 2)
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    entry = {"image": "VizWiz_val_00000000.jpg", "question": "?", "answers": answers, "answer_type": "other"}
    (root / "Annotations").mkdir()
    (root / "Annotations" / "val.json").write_text(json.dumps([entry]))
    found = find_questions(root, "val", None, None, None)
    assert (found.kind, found.ids) == ("vizwiz", ["VizWiz_val_00000000.jpg"])
    assert found.samples[0].image.is_file()


QUESTION = {"question_id": 1, "image_id": 1, "question": "?"}


@pytest.mark.parametrize(
    ("questions", "annotations", "words"),
    [
        ("no json", None, "is not JSON"),
        ({"pictures": []}, None, "is of no known format"),
        (7, None, "is of no known format"),
        ({"questions": {}}, None, "'questions' is dict, expected a list"),
        ({"questions": []}, None, "holds no questions"),
        ({"questions": [{**QUESTION, "question": None}]}, None, "question 0: 'question' is NoneType"),
        ({"questions": [{"question_id": 1}]}, None, "'image_id' is missing"),
        ({"questions": ["?"]}, None, "question 0 is str"),
        ({"questions": [QUESTION, QUESTION]}, None, "asks question 1 twice"),
        ({"questions": [QUESTION]}, {"annotations": []}, "question_id 1 has no annotation"),
        (
            {"questions": [QUESTION]},
            {"annotations": [{"question_id": 1, "answers": []}]},
            "'answers' is empty",
        ),
        (
            {"questions": [QUESTION]},
            {"annotations": [{"question_id": 1, "answers": [{"answer": 3}]}]},
            "answer 0: 'answer' is int",
        ),
        ({"data": [{"question_id": 1, "image_id": "a"}]}, None, "'question' is missing"),
        ([{"image": "a.jpg", "question": "?", "answers": "x"}], None, "'answers' is str"),
    ],
)
def test_damaged_files_are_named(tmp_path, draw, questions, annotations, words):
    draw(tmp_path / "1.jpg", 1)
    paths = []
    for name, content in (("q.json", questions), ("a.json", annotations)):
        paths.append(None if content is None else tmp_path / name)
        if content is not None:
            paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"[qa]\.json") as caught:
        read_questions(paths[0], paths[1], PictureFolder(tmp_path))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def evaluate(speller, data, root, *more):
    arguments = [f"checkpoint={speller[0]}", f"data={data}", f"runs_dir={root}", "task.max_new_tokens=6"]
    assert main(["eval", "task=vqa", *arguments, "task.batch_size=2", *more]) == 0
    latest = root / "eval_vqa" / "latest"
    files = {path.name: json.loads(path.read_text()) for path in latest.glob("*.json")}
    return files.pop("metrics.json"), files


def agree_with(coco, predictions):
    """Let 0, 2, 4, … people have given the model's own answers."""
    path = coco / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    for number, (entry, row) in enumerate(zip(content["annotations"], predictions, strict=True)):
        for answer in entry["answers"][: 2 * number]:
            answer["answer"] = row["answer"]
    path.write_text(json.dumps(content))


def test_scores_are_those_of_answers_written_one_by_one(speller, coco, tmp_path, capsys):
    _, files = evaluate(speller, coco, tmp_path / "runs", "task.num_beams=1")
    agree_with(coco, files["predictions.json"])
    scores, files = evaluate(speller, coco, tmp_path / "runs", "task.num_beams=1")
    assert "vqa/accuracy" in capsys.readouterr().out
    _, model, processor = speller
    questions = find_questions(coco, "val", None, None, None).samples
    banned = [[processor.tokenizer.require(t)] for t in ("<image>", "<fake_token_around_image>", "\n")]
    total = 0.0
    for sample, given in zip(questions, files["predictions.json"], strict=True):
        prefix = "Instruction: provide an answer to the question. Use the image to answer.\nImage:"
        prompt = [prefix, sample.image, f"Question: {sample.fields['question']} Answer:"]
        inputs = processor([prompt])
        ids = model.generate(**inputs, max_new_tokens=6, bad_words_ids=banned, eos_token_id=2)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert given["answer"] == normalise_answer(text)
        total += official_accuracy(text.strip(), sample.answers)
    assert scores["vqa/accuracy"] == pytest.approx(total / 5)
    assert scores["vqa/accuracy_normalised"] == pytest.approx((0 + 0.6 + 1 + 1 + 1) / 5)
    assert (scores["vqa/questions"], scores["vqa/skipped"]) == (5, 0)
    assert set(scores) >= {"vqa/accuracy/other", "vqa/accuracy/yes_no", "vqa/accuracy_normalised"}
    assert [row["question_id"] for row in files["predictions.json"]] == [2000, 2010, 2020, 2030, 2040]


@pytest.mark.parametrize("choice", ["random", "rices"])
def test_two_ranks_score_what_one_scores(speller, coco, tmp_path, on_ranks, choice):
    more = ["task.shots=[0,2]", f"task.choice={choice}"]
    _, files = evaluate(speller, coco, tmp_path / "one", *more)
    agree_with(coco, files["predictions_0_shots.json"])
    (coco / "val2014" / "COCO_val2014_000000000203.jpg").write_bytes(b"\xff\xd8\xff broken")
    alone = evaluate(speller, coco, tmp_path / "one", *more)
    assert alone[0]["vqa/accuracy_normalised_0_shots"] > 0

    def work():
        arguments = [f"checkpoint={speller[0]}", f"data={coco}", f"runs_dir={tmp_path / 'two'}", *more]
        return main(["eval", "task=vqa", *arguments, "task.max_new_tokens=6", "task.batch_size=2"])

    assert on_ranks(work, 2) == [0, 0]
    latest = tmp_path / "two" / "eval_vqa" / "latest"
    assert json.loads((latest / "metrics.json").read_text()) == alone[0]
    assert alone[0]["vqa/questions_2_shots"] == alone[0]["vqa/questions_0_shots"] == 4
    assert alone[0]["vqa/skipped"] == (2 if choice == "random" else 3)  # rices embeds the picture too
    for name in ("predictions_0_shots.json", "predictions_2_shots.json"):
        assert json.loads((latest / name).read_text()) == alone[1][name]
    assert len([p for p in (tmp_path / "two" / "eval_vqa").iterdir() if not p.is_symlink()]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "data is not set"),
        (["data={tmp}/none"], "does not exist"),
        (["data={tmp}/vqa", "task.split=test"], "no JSON file of questions"),
        (["data={tmp}/vqa", "task.images={tmp}/none"], "folder of pictures"),
        (["data={tmp}/vqa", "task.images={tmp}/other"], "none of 5 samples could be used"),
        (["data={tmp}/vqa", "task.shots=9"], "needs 9 examples but the support has 4"),
        (["data={tmp}/vqa", "task.shots=many"], "shots=many"),
        (["data={tmp}/vqa", "task.choice=best"], "choice='best'"),
        (["data={tmp}/vqa", "task.dtype=int8"], "dtype='int8'"),
        (["data={tmp}/vqa", "task.batch_size=0"], "batch_size=0"),
        (["data={tmp}/vqa", "task.prompt=hello"], "write <image> once"),
        (["data={tmp}/vqa", "devices=0"], "devices=0"),
        (["data={tmp}/vqa", "task=demo", "devices=2"], "runs in one process, not in 2"),
    ],
)
def test_mistakes_are_one_line(speller, coco, tmp_path, draw, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "other" / "x.png", 1)
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert main(["eval", "task=vqa", f"checkpoint={speller[0]}", *given]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_several_devices_start_that_many_processes(speller, coco, monkeypatch):
    import os
    import sys

    started = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append((program, arguments)))
    monkeypatch.setattr("interloom.train.evaluation.tasks.run_task", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # where execv does not return, evaluation would not go on
        main(["eval", "task=vqa", f"checkpoint={speller[0]}", f"data={coco}", "devices=3"])
    ((program, arguments),) = started
    assert program == sys.executable
    assert arguments[arguments.index("3") + 1 :][:2] == ["interloom.train.evaluation", "task=vqa"]


def test_what_is_wrong_is_said_once(speller, tmp_path, on_ranks, capfd):
    def work():
        try:
            return main(["eval", "task=vqa", f"checkpoint={speller[0]}", f"data={tmp_path / 'none'}"])
        except SystemExit as stop:
            return stop.code

    assert on_ranks(work, 2) == [2, 2]
    assert capfd.readouterr().err.count("does not exist") == 1
