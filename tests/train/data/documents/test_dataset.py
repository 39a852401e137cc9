"""Packed batches against the stored documents, over ranks, workers and resumes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from interloom.train.data.documents.build import convert
from interloom.train.data.documents.dataset import DocumentsConfig, DocumentsTransform, documents_loader
from interloom.train.data.documents.options import ConvertOptions
from interloom.train.data.documents.tokenization import DocumentTokenizer
from interloom.train.data.drawn.documents import (
    CLASS_NAMES,
    COLOURS,
    IMAGE_SIZE,
    draw_document,
    words,
    write_demo,
)
from interloom.train.data.order import check_fingerprint
from interloom.train.data.shards.reader import ShardReader, ShardSet
from PIL import Image

from .conftest import picture, record


@pytest.fixture
def config(demo_folder):
    return DocumentsConfig(
        sources={"demo": [str(demo_folder / "train")]},
        val={"demo": [str(demo_folder / "val")]},
        tokenizer=str(demo_folder / "tokenizer"),
        max_tokens=128,
        max_images=8,
        image_size=32,
        window_documents=64,
        batch_size=8,
        eval_batch_size=4,
        workers=0,
    )


def collect(config, **options):
    return list(documents_loader(config, seed=1, **options))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[name]), name
        else:
            assert value == right[name], name


def test_an_epoch_is_every_document_once(config, demo_folder):
    shards = ShardSet.open([str(demo_folder / "train")])
    reader = ShardReader(shards)
    wanted = sorted(token for s in range(len(shards)) for token in reader.read(s).json()["ids"])
    loader = documents_loader(config, seed=1)
    size = len(loader.plan)
    found, images = [], 0
    for batch in loader:
        inside = batch["positions"] < size
        found += batch["input_ids"][inside][batch["document_ids"][inside] >= 0].tolist()
        images += int(batch["image_valid"][inside].sum())
    assert sorted(found) == wanted
    assert images == shards.images


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 0), (8, 1)])
def test_ranks_and_workers_see_one_order(config, world, workers):
    whole = collect(config, max_steps=3)
    parts = [
        collect(replace(config, workers=workers), max_steps=3, rank=r, world_size=world) for r in range(world)
    ]
    for step, batch in enumerate(whole):
        for name in ("input_ids", "document_ids", "position_ids", "labels", "positions", "source_ids"):
            assert torch.equal(torch.cat([part[step][name] for part in parts]), batch[name]), name
        assert [key for part in parts for key in part[step]["keys"]] == batch["keys"]
        rows = 0
        for part in parts:  # images are padded to the most of each share
            share = part[step]
            count = share["pixel_values"].shape[1]
            here = slice(rows, rows + len(share["input_ids"]))
            assert torch.equal(share["pixel_values"], batch["pixel_values"][here, :count])
            assert torch.equal(share["image_attention_mask"], batch["image_attention_mask"][here, :, :count])
            assert not batch["image_valid"][here, count:].any()
            rows = here.stop


@pytest.mark.parametrize("seed", range(10))
def test_resume_at_any_step_on_other_ranks(config, seed):
    rng = np.random.default_rng(seed)
    stop, steps = int(rng.integers(0, 5)), 5
    world = int(rng.choice([1, 2, 4]))
    whole = collect(config, max_steps=steps)
    resumed = [
        collect(config, max_steps=steps, start_step=stop, rank=rank, world_size=world)
        for rank in range(world)
    ]
    assert all(len(part) == steps - stop for part in resumed)
    for offset in range(steps - stop):
        batch, ids = whole[stop + offset], [part[offset]["input_ids"] for part in resumed]
        assert torch.equal(torch.cat(ids), batch["input_ids"])
        first = resumed[0][offset]
        count, rows = first["pixel_values"].shape[1], len(first["input_ids"])
        assert torch.equal(first["pixel_values"], batch["pixel_values"][:rows, :count])
        assert torch.equal(first["image_attention_mask"], batch["image_attention_mask"][:rows, :, :count])


@pytest.mark.parametrize("attention", ["latest", "all_previous"])
def test_masks_by_brute_force(config, attention):
    config = replace(config, image_attention=attention)
    tokenizer = DocumentTokenizer(config.tokenizer)
    for batch in collect(config, max_steps=2):
        for row in range(len(batch["input_ids"])):
            ids, documents = batch["input_ids"][row].tolist(), batch["document_ids"][row].tolist()
            expected = torch.zeros_like(batch["image_attention_mask"][row])
            image, seen, current = -1, [], None
            for token, (number, document) in enumerate(zip(ids, documents, strict=True)):
                if document != current:
                    current, seen = document, []
                    place = 0
                if document < 0:
                    continue
                if number == tokenizer.image_id:
                    image += 1
                    seen.append(image)
                looked_at = seen[-1:] if attention == "latest" else seen
                expected[token, looked_at] = True
                assert batch["position_ids"][row, token] == place
                assert batch["labels"][row, token] == (number if place else -100)
                place += 1
            assert torch.equal(batch["image_attention_mask"][row], expected)
            assert (batch["attention_mask"][row] == (batch["document_ids"][row] >= 0)).all()


def test_pixels_are_those_of_the_image(config, demo_folder):
    config = replace(config, crop_scale=None, image_size=IMAGE_SIZE)
    batch = next(iter(documents_loader(config, seed=1, max_steps=1)))
    shards = ShardSet.open([str(demo_folder / "train")])
    reader = ShardReader(shards)
    by_name = {reader.name(s): s for s in range(len(shards))}
    key = batch["keys"][0].split()[0]
    stored = reader.read(by_name[key])
    number = len(stored.json()["images"])
    import io

    for image in range(min(number, int(batch["image_valid"][0].sum()))):
        reference = np.asarray(Image.open(io.BytesIO(stored.members[f"{image}.jpg"])).convert("RGB"))
        ours = batch["pixel_values"][0, image].permute(1, 2, 0).numpy()
        if batch["document_ids"][0, 0] == 0 and stored.json()["ids"][0] == batch["input_ids"][0, 0]:
            assert np.abs(ours.astype(int) - reference.astype(int)).max() <= 3
    ready = DocumentsTransform(config)(batch)
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    expected = (batch["pixel_values"][0, 0].float() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ready["pixel_values"][0, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_broken_image_leaves_its_document(config, tmp_path, demo_folder):
    """The shard is damaged after it was indexed: one image fails its checksum, the text and the rest stay."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(demo_folder / "train", folder)
    shards = ShardSet.open([str(folder)])
    member = next(m for m in shards.index(0).members(0) if m.extension == "1.jpg")
    with open(shards.shards[0].url, "r+b") as file:
        file.seek(member.offset + member.length // 2)
        file.write(b"\xff\x00\xff\x00\xff")
    whole = documents_loader(replace(config, crop_scale=None), seed=1)
    hurt = documents_loader(
        replace(config, crop_scale=None, sources={"demo": [str(folder)]}, max_skip_rate=1.0), seed=1
    )
    differing = 0
    for good, bad in zip(whole, hurt, strict=True):
        assert torch.equal(good["input_ids"], bad["input_ids"])
        lost = good["image_valid"] & ~bad["image_valid"]
        differing += int(lost.sum())
        assert not bad["pixel_values"][lost].any()
        assert not bad["image_attention_mask"].transpose(1, 2)[lost].any()
        assert torch.equal(bad["pixel_values"][~lost], good["pixel_values"][~lost])
    assert differing == 1
    assert hurt.report.counts == {"checksum differs": 1}


def test_a_changed_shard_seed_or_tokenizer_is_refused(config, tmp_path, demo_folder):
    saved = documents_loader(config, seed=1).fingerprint()
    saved = json.loads(json.dumps(saved))  # checkpoints hold plain types
    check_fingerprint(saved, documents_loader(config, seed=1, rank=1, world_size=2).fingerprint())
    with pytest.raises(ValueError, match="seed was"):
        check_fingerprint(saved, documents_loader(config, seed=2).fingerprint())
    with pytest.raises(ValueError, match="max_tokens was 128 and is 256"):
        check_fingerprint(saved, documents_loader(replace(config, max_tokens=256), seed=1).fingerprint())
    other = tmp_path / "other"
    write_demo(other, train=40, val=0, seed=4)
    changed = replace(config, sources={"demo": [str(other / "train")]})
    with pytest.raises(ValueError, match="shards of demo changed"):
        check_fingerprint(saved, documents_loader(changed, seed=1).fingerprint())
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    text = (demo_folder / "tokenizer" / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ValueError, match="tokenised with another tokenizer"):
        documents_loader(replace(config, tokenizer=str(tokenizer)), seed=1)


def test_sources_mix_and_say_whose_token_is_whose(config, tmp_path, tokenizer_folder, demo_folder):
    """Pairs and plain text are documents too."""
    pairs = [record(["the apple is red .", (f"s{n}", 0)]) for n in range(30)]
    for n, r in enumerate(pairs):
        r["images"][1] = f"{n}.jpg"
        (tmp_path / f"{n}.jpg").write_bytes(picture(n, (40, 40)))
    text = [record(["the number of objects is one ."]) for _ in range(30)]
    from interloom.train.data.documents.records import Filters

    sources = {"demo": [str(demo_folder / "train")]}
    for name, rows in (("pairs", pairs), ("text", text)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ConvertOptions(
            str(demo_folder / "tokenizer"), filters=Filters.none(), image_root=str(tmp_path)
        )
        convert(str(path), tmp_path / name, options)
        sources[name] = [str(tmp_path / name)]
    config = replace(config, sources=sources, weights={"demo": 2.0, "pairs": 1.0, "text": 1.0}, batch_size=40)
    counts = torch.zeros(3)
    for batch in collect(config, max_steps=10):
        ids = batch["source_ids"]
        assert torch.equal(ids >= 0, batch["document_ids"] >= 0)
        counts += torch.bincount(ids[ids >= 0], minlength=3)
        text_rows = (ids == 2).any(1)
        assert not batch["image_attention_mask"][text_rows].any()
    shares = counts / counts.sum()
    assert abs(shares[0] - 0.5) < 0.1
    assert batch["pixel_values"].shape[1] >= 1  # the vision tower has something to run on


def test_a_batch_of_text_still_has_an_image_slot(config, tmp_path, demo_folder):
    from interloom.train.data.documents.records import Filters

    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(record(["the apple is red ."])) + "\n" for _ in range(9)))
    convert(str(path), tmp_path / "t", ConvertOptions(str(demo_folder / "tokenizer"), filters=Filters.none()))
    batch = collect(replace(config, sources={"t": [str(tmp_path / "t")]}), max_steps=1)[0]
    assert batch["pixel_values"].shape == (8, 1, 3, 32, 32)
    assert not batch["image_valid"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"image_attention": "next"}, "image_attention='next'"),
        ({"weights": {"demo": 0.0}}, "above 0"),
        ({"batch_size": 7}, "multiple"),
    ],
)
def test_bad_configs(config, change, message):
    with pytest.raises(ValueError, match=message):
        documents_loader(replace(config, **change), seed=1, world_size=2)


def test_drawn_documents_do_not_answer_themselves():
    """No answer follows from its text: what was said of a scene before is another object or another matter."""
    vocabulary, seen = set(words()), {}
    for number in range(300):
        document = draw_document(0, number)
        again = draw_document(0, number)
        assert document.images == again.images
        assert document.texts == again.texts
        for question in document.questions:
            text = document.texts[question["part"]]
            answer = text[question["start"] : question["end"]]
            assert answer in vocabulary
            seen.setdefault(question["kind"], []).append(answer)
            before = text[: question["start"]].split()
            if question["kind"] in ("class", "colour"):
                assert answer not in before
    assert set(seen) == {"colour", "class", "count", "relation", "reference", "in_context"}
    for kind, names in (("colour", COLOURS), ("class", CLASS_NAMES)):
        counts = np.array([seen[kind].count(name) for name in names])
        assert counts.max() < 2.2 * counts.mean()


def test_in_context_documents_show_the_word_before_they_ask():
    for number in range(40):
        for shots in (1, 2, 4):
            document = draw_document(0, number, in_context=shots)
            texts = [t for t in document.texts if t]
            assert len(texts) == shots + 1
            assert texts[-1] in texts[:-1]
