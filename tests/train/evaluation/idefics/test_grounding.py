"""Grounding figures against models whose answers are known."""

import json
from types import SimpleNamespace

import pytest
import torch
from interloom.models.idefics import IdeficsImageProcessor
from interloom.train.data.documents.tokenization import DocumentTokenizer
from interloom.train.data.drawn.documents import write_demo
from interloom.train.data.drawn.objects import CLASS_NAMES
from interloom.train.evaluation.idefics.grounding import ask, evaluate_grounding, held_out
from interloom.train.evaluation.pictures.curves import draw_curves
from interloom.train.runs import MetricsTable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "demo"
    write_demo(folder, train=4, val=40, seed=1)
    return folder


class Oracle(torch.nn.Module):
    """Copies the next token if the images are those it knows, and says nothing sensible otherwise."""

    def __init__(self, known):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.known = known

    def forward(self, input_ids, document_ids, pixel_values, image_attention_mask):
        logits = torch.zeros(*input_ids.shape, 130)
        for row, ids in enumerate(input_ids.tolist()):
            count = int((document_ids[row] >= 0).sum())
            images = int(image_attention_mask[row].any(0).sum())
            key = tuple(ids[:count])
            seen = images and torch.equal(pixel_values[row, :images], self.known[key])
            for position in range(count - 1):
                logits[row, position, ids[position + 1] if seen else 0] = 1.0
        return SimpleNamespace(logits=logits)


def test_only_the_right_images_help_a_model_that_looks(folder, tmp_path):
    processor = SimpleNamespace(image_processor=IdeficsImageProcessor(image_size=64))
    documents = held_out(folder, DocumentTokenizer(folder / "tokenizer"), 40)
    known = {tuple(d.ids): processor.image_processor(d.images) for d in documents}
    results = evaluate_grounding(
        Oracle(known), processor, folder, shots=0, batch_size=7, picture=tmp_path / "g.png"
    )
    assert results["grounding/right"] == results["grounding/right_reference"] == 1.0
    assert results["grounding/shuffled"] == results["grounding/none"] == 0.0
    assert 1 / 10 <= results["grounding/chance"] <= 1 / 8
    assert (tmp_path / "g.png").stat().st_size > 10_000


def test_answers_are_found_by_their_place_in_the_text(folder):
    tokenizer = DocumentTokenizer(folder / "tokenizer")
    for document in held_out(folder, tokenizer, 40):
        assert document.answers
        for kind, position, choices in document.answers:
            assert choices >= 2
            follows = tokenizer.decode([document.ids[position + 1]])
            assert follows == "." or (kind == "colour" and follows in CLASS_NAMES)


def test_an_answer_of_several_tokens_is_refused(folder):
    tokenizer = DocumentTokenizer(folder / "tokenizer")
    question = {"part": 0, "start": 4, "end": 15, "kind": "class", "choices": 2}
    with pytest.raises(ValueError, match="is not one token"):
        ask(["the red apple is"], [], [question], tokenizer)


def test_the_stored_questions_are_those_of_the_records(folder):
    import pyarrow.parquet as parquet

    rows = parquet.read_table(folder / "records" / "val.parquet").to_pylist()
    documents = held_out(folder, DocumentTokenizer(folder / "tokenizer"), 40)
    for row, document in zip(rows, documents, strict=True):
        kinds = [question["kind"] for question in json.loads(row["general_metadata"])["questions"]]
        assert [kind for kind, *_ in document.answers] == kinds


def test_the_curves_of_a_run_are_drawn(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    for step in (1, 2):
        table.append(
            step, {"train/loss": 2.0 / step, "train/gate/attention_0": 0.1 * step, "train/gate/mlp_0": 0.5}
        )
    assert draw_curves(tmp_path).stat().st_size > 5_000
    with pytest.raises(ValueError, match="has no losses"):
        draw_curves(tmp_path / "other")
