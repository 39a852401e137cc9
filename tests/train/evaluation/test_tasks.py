"""``interloom eval`` of segmentation, classification and retrieval end to end, and what it refuses."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interloom.train.cli import main
from interloom.train.data.shards.reader import ShardReader
from interloom.train.evaluation.groupvit.classification import evaluate_classification, image_folders
from interloom.train.evaluation.groupvit.retrieval import evaluate_retrieval, open_pairs
from PIL import Image


def make_classes(root):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "tree_bus"):
        (root / "val" / name).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{index}.png")
    return root


@torch.no_grad()
def test_classification_equals_one_image_at_a_time(tmp_path, model, processor):
    images, folders = image_folders(make_classes(tmp_path))
    names = ["cat", "dog", "tree bus"]
    assert folders == ["cat", "dog", "tree_bus"]
    found = evaluate_classification(model, processor, images, names, templates=("a {}.", "{}"), batch_size=4)
    hits = 0
    for path, label in images:
        pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        image = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)[0]
        scores = []
        for name in names:
            raw = [
                model.get_text_features(processor(text=t.format(name), return_tensors="pt")["input_ids"])
                for t in ("a {}.", "{}")
            ]
            scores.append(F.normalize(sum(r.pooler_output[0] for r in raw) / 2, dim=0) @ image)
        hits += int(np.argmax(scores)) == label
    assert found["classification/top1"] == pytest.approx(hits / 9)
    assert found["classification/top5"] == 1.0
    assert found["classification/chance"] == pytest.approx(1 / 3)


@torch.no_grad()
def test_retrieval_equals_brute_force(shards, model, processor):
    pairs = open_pairs(str(shards), "val")
    reader = ShardReader(pairs)
    found = evaluate_retrieval(model, processor, reader, range(6), batch_size=4)
    images, texts = [], []
    for index in range(6):
        record = reader.read(index)
        texts.append(record.text("txt").strip())
        picture = Image.open(io.BytesIO(bytes(record.members["png"])))
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        images.append(F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)[0])
    distinct = sorted(set(texts))
    vectors = {}
    for text in distinct:
        ids = processor(text=text, return_tensors="pt")["input_ids"]
        vectors[text] = F.normalize(model.get_text_features(ids).pooler_output, dim=-1)[0]
    ranks = [
        sorted(distinct, key=lambda t: -float(vectors[t] @ image)).index(text)
        for image, text in zip(images, texts, strict=True)
    ]
    for k in (1, 5, 10):
        expected = np.mean([rank < k for rank in ranks])
        assert found[f"retrieval/image_to_text_r{k}"] == pytest.approx(expected)
    first = []
    for text in distinct:
        order = sorted(range(6), key=lambda i: -float(vectors[text] @ images[i]))
        first.append(texts[order[0]] == text)
    assert found["retrieval/text_to_image_r1"] == pytest.approx(np.mean(first))
    assert found["retrieval/captions"] == 5
    assert found["retrieval/chance_r5"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("task", ["segmentation", "classification", "retrieval"])
def test_eval_writes_its_scores(tmp_path, monkeypatch, folder, shards, capsys, task):
    monkeypatch.chdir(tmp_path)
    data = make_classes(tmp_path / "c") if task == "classification" else shards
    assert main(["eval", f"task={task}", f"checkpoint={folder}", f"data={data}"]) == 0, (
        capsys.readouterr().err
    )
    latest = tmp_path / "runs" / f"eval_{task}" / "latest"
    scores = json.loads((latest / "metrics.json").read_text())
    key = {"segmentation": "miou", "classification": "top1", "retrieval": "image_to_text_r1"}[task]
    assert 0 <= scores[f"{task}/{key}"] <= 1
    assert f"{task}/{key}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=segmentation"], "data is not set"),
        (["task=segmentation", "data={tmp}/none"], "data={tmp}/none does not exist"),
        (["task=segmentation", "data={tmp}/empty"], "laid out like none of the known data sets"),
        (["task=segmentation", "data={tmp}/empty", "task.kind=voc"], "is not laid out as voc"),
        (["task=segmentation", "data={tmp}/empty", "task.kind=ade"], "kind='ade'"),
        (["task=classification", "data={tmp}/empty"], "no folders with images"),
        (
            ["task=classification", "data={tmp}/classes", "task.labels={tmp}/none.txt"],
            "none.txt does not exist",
        ),
        (["task=classification", "data={tmp}/classes", "task.labels=voc"], "names 21 classes"),
        (["task=classification", "data={tmp}/classes", "task.templates=some"], "templates='some'"),
        (["task=classification", "data={tmp}/broken"], "broken.png"),
        (["task=retrieval", "data={tmp}/none"], "does not exist"),
        (["task=retrieval", "data={tmp}/empty"], "empty"),
    ],
)
def test_eval_refuses_in_one_sentence(tmp_path, monkeypatch, folder, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_classes(tmp_path / "classes")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    call = ["eval", f"checkpoint={folder}", *(a.format(tmp=tmp_path) for a in arguments)]
    assert main(call) == 2
    error = capsys.readouterr().err.strip()
    assert words.format(tmp=tmp_path) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("metrics.json"))
