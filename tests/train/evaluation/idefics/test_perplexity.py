"""Perplexity against Transformers in float64, one document at a time."""

import io
import json
import math
import shutil

import pytest
import torch
import transformers
from interloom.train.cli import main
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.evaluation.idefics.document_sources import find_sources
from PIL import Image


def stored(folder):
    """(ids, pictures) of the documents of a folder of shards."""
    shards = ShardSet.open([str(folder)], kind="documents")
    for number in range(len(shards)):
        record = ShardReader(shards).read(number)
        names = sorted((n for n in record.members if n != "json"), key=lambda name: int(name.split(".")[0]))
        yield record.json()["ids"], [Image.open(io.BytesIO(bytes(record.members[n]))) for n in names]


@torch.no_grad()
def nll(model, processor, ids, pictures, look):
    """Summed loss over what is no image token, and the number of tokens."""
    image, around = (processor.tokenizer.require(t) for t in ("<image>", "<fake_token_around_image>"))
    pixels = processor.image_processor(pictures).double()
    seen = torch.zeros(1, len(ids), len(pictures), dtype=torch.long)
    latest = -1
    for place, token in enumerate(ids):
        latest += token == image
        if look and latest >= 0:
            seen[0, place, latest] = 1
    logits = model(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=pixels[None],
        image_attention_mask=seen,
    ).logits[0]
    targets = torch.tensor(ids[1:])
    each = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none")
    kept = (targets != image) & (targets != around)
    return float(each[kept].sum()), int(kept.sum())


def evaluate(checkpoint, data, root, *more):
    arguments = [f"checkpoint={checkpoint}", f"data={data}", f"runs_dir={root}", *more]
    assert main(["eval", "task=perplexity", *arguments]) == 0
    return json.loads((root / "eval_perplexity" / "latest" / "metrics.json").read_text())


def test_perplexity_equals_transformers_document_by_document(adapted_run, documents, tmp_path, on_ranks):
    from interloom.train.checkpointing.load import load_pretrained

    two = tmp_path / "two"  # two sources: the held-out documents and some of the others
    shutil.copytree(documents / "val", two / "held_out" / "val")
    shutil.copytree(documents / "train", two / "seen")
    found = evaluate(adapted_run, two, tmp_path / "one", "task.batch_size=3")
    _, processor = load_pretrained(adapted_run)
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(adapted_run / "model").double().eval()
    sums = {}
    for name, folder in (("held_out", documents / "val"), ("seen", documents / "train")):
        for look in (True, False):
            parts = [nll(theirs, processor, ids, pictures, look) for ids, pictures in stored(folder)]
            sums[name, look] = tuple(map(sum, zip(*parts, strict=True)))
    for look, key in ((True, "with_images"), (False, "without_images")):
        for name in ("held_out", "seen"):
            total, tokens = sums[name, look]
            assert found[f"perplexity/{name}/{key}"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
            assert found[f"perplexity/{name}/tokens"] == tokens
        total, tokens = (a + b for a, b in zip(sums["held_out", look], sums["seen", look], strict=True))
        assert found[f"perplexity/{key}"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["perplexity/with_images"] != pytest.approx(found["perplexity/without_images"], rel=1e-4)
    assert (found["perplexity/documents"], found["perplexity/held_out/documents"]) == (27, 11)
    assert found["perplexity/images"] == sum(
        len(p) for f in ("train", "val") for _, p in stored(documents / f)
    )

    def work():
        arguments = [f"checkpoint={adapted_run}", f"data={two}", f"runs_dir={tmp_path / 'ranks'}"]
        return main(["eval", "task=perplexity", *arguments, "task.batch_size=3"])

    assert on_ranks(work, 2) == [0, 0]
    latest = tmp_path / "ranks" / "eval_perplexity" / "latest"
    again = json.loads((latest / "metrics.json").read_text())
    assert again == pytest.approx(found, rel=1e-12)
    counts = [name for name in found if name.endswith(("tokens", "documents", "images", "skipped"))]
    assert all(again[name] == found[name] for name in counts if "with" not in name)


def test_adapters_and_runs_may_be_evaluated_as_they_are(adapted_run, documents, tmp_path):
    (saved,) = (adapted_run / "checkpoints").glob("*.ckpt")
    exported = evaluate(adapted_run, documents, tmp_path / "a", "task.limit=5")
    assert exported["perplexity/documents"] == 5
    from_adapters = evaluate(
        saved, adapted_run, tmp_path / "b", "task.limit=5"
    )  # the data that the run names
    demo, own = ({n.rpartition("/")[2]: v for n, v in scores.items()} for scores in (exported, from_adapters))
    assert demo == pytest.approx(own, rel=1e-6)


def test_long_documents_are_cut_and_image_tokens_scored_if_asked(adapted_run, documents, tmp_path):
    whole = evaluate(adapted_run, documents, tmp_path / "a")
    cut = evaluate(adapted_run, documents, tmp_path / "b", "task.max_tokens=24")
    assert cut["perplexity/documents"] > whole["perplexity/documents"] == 11
    assert cut["perplexity/images"] == whole["perplexity/images"]
    marked = evaluate(adapted_run, documents, tmp_path / "c", "task.image_tokens=true")
    every = sum(len(ids) - 1 for ids, _ in stored(documents / "val"))
    assert marked["perplexity/tokens"] == every > whole["perplexity/tokens"]


def test_what_cannot_be_read_is_counted(adapted_run, documents, tmp_path, capsys):
    shutil.copytree(documents / "val", tmp_path / "broken")
    (tar,) = (tmp_path / "broken").glob("*.tar")
    shards = ShardSet.open([str(tar.parent)], kind="documents")
    record = ShardReader(shards).read(0)
    picture = next(bytes(data) for name, data in record.members.items() if name != "json")
    content = bytearray(tar.read_bytes())
    content[content.find(picture) + len(picture) // 2] ^= 255
    place = content.find(b'"ids"', len(content) // 2)
    content[place] ^= 1
    tar.write_bytes(content)
    found = evaluate(adapted_run, tmp_path / "broken", tmp_path / "runs")
    assert (found["perplexity/skipped_documents"], found["perplexity/documents"]) == (1, 10)
    lost = len(list(stored(documents / "val"))[6][1])  # pictures of the document that cannot be read
    assert found["perplexity/skipped_images"] == lost + 1
    assert found["perplexity/skipped"] == 2
    assert "left out: 1 × checksum differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("none", "does not exist"),
        ("empty", "holds no shards"),
        ("wrong.yaml", "names no documents"),
        ("broken.yaml", "cannot be read as a configuration"),
    ],
)
def test_data_that_is_none(tmp_path, data, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.yaml").write_text("data: {train: x}")
    (tmp_path / "broken.yaml").write_text("data: [")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        find_sources(tmp_path / data, "val")


def test_models_and_tokenizers_that_do_not_fit(speller, documents, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "task=perplexity", f"checkpoint={speller[0]}", f"data={documents}"]) == 2
    assert "was tokenised with another tokenizer" in capsys.readouterr().err
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "groupvit"}')
    assert main(["eval", "task=perplexity", f"checkpoint={folder}", f"data={documents}"]) == 2
    assert "needs an IDEFICS" in capsys.readouterr().err
