"""The order of samples: every one once an epoch, the same for any ranks and workers, resumed at any step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interloom.train.data.loader import PlanLoader, empty_batch
from interloom.train.data.order import PairsPlan, Permutation, check_fingerprint
from interloom.train.data.pairs.dataset import PairsConfig, PairsTransform, pairs_loader
from interloom.train.data.report import SkipRateError
from interloom.train.data.shards.reader import ShardSet
from interloom.train.data.shards.writer import ShardFile, ShardWriter
from PIL import Image


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_permutation_is_a_bijection(size, key):
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


def test_permutation_of_any_size_is_sought_at_once():
    size = 141_000_000_000
    places = np.array([0, 1, size // 2, size - 1])
    found = Permutation(size, 7)(places)
    assert len(set(found.tolist())) == 4
    assert ((found >= 0) & (found < size)).all()
    assert np.array_equal(found[2:], Permutation(size, 7)(places[2:]))
    assert not np.array_equal(found, Permutation(size, 8)(places))


def test_permutation_mixes():
    """Neighbours land far apart, and places and images are uncorrelated, over many keys."""
    size = 1000
    correlation = [
        np.corrcoef(np.arange(size), Permutation(size, key)(np.arange(size)))[0, 1] for key in range(200)
    ]
    assert abs(np.mean(correlation)) < 4 / np.sqrt(200 * size)
    assert np.std(correlation) == pytest.approx(1 / np.sqrt(size), rel=0.25)
    firsts = [int(Permutation(10, key)(np.array([0]))[0]) for key in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 30  # chi squared, 9 degrees of freedom, p = 0.0004


def jpeg(colour, side=20) -> bytes:
    import io

    out = io.BytesIO()
    Image.new("RGB", (side, side + 4), colour).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    with ShardWriter(folder, samples_per_shard=11) as writer:
        for i in range(50):
            image = jpeg((5 * i, 255 - 5 * i, 100))
            writer.add(
                f"s{i:02d}", {"jpg": image, "txt": f"caption {i}".encode(), "json": b'{"nouns": ["n"]}'}
            )
    return folder


def config(folder, **options) -> PairsConfig:
    options = {"batch_size": 8, "image_size": 16, "workers": 0, **options}
    return PairsConfig(train=[str(folder)], val=[str(folder)], **options)


def batches(folder, steps=14, workers=0, rank=0, world=1, start=0, **options):
    options = {"workers": workers, **options}
    loader = pairs_loader(
        config(folder, **options), seed=5, rank=rank, world_size=world, start_step=start, max_steps=steps
    )
    return list(loader)


def test_an_epoch_holds_every_sample_once_and_epochs_differ(shards):
    plan = PairsPlan(ShardSet.open(shards), seed=3)
    epochs = plan.locate(np.arange(150)).reshape(3, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 1), (8, 0)])
def test_ranks_and_workers_change_nothing(shards, world, workers):
    alone = batches(shards)
    split = [batches(shards, workers=workers, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(alone):
        parts = [ranks[step] for ranks in split]
        assert torch.equal(torch.cat([p["pixel_values"] for p in parts]), batch["pixel_values"])
        assert [caption for p in parts for caption in p["captions"]] == batch["captions"]
        assert torch.cat([p["positions"] for p in parts]).tolist() == list(range(8 * step, 8 * step + 8))


@pytest.mark.parametrize("kill", [1, 2, 3, 5, 6, 7, 9, 10, 12, 13])
def test_resume_gives_the_remaining_batches(shards, kill):
    whole = batches(shards)
    rest = batches(shards, start=kill, rank=1, world=2, workers=int(kill % 5 == 2))
    transform = PairsTransform(config(shards), seed=5)
    for batch, expected in zip(rest, whole[kill:], strict=True):
        assert batch["keys"] == expected["keys"][4:]
        assert torch.equal(batch["pixel_values"], expected["pixel_values"][4:])
        assert torch.equal(transform(batch)["pixel_values"], transform(expected)["pixel_values"][4:])


def test_length_is_that_of_the_whole_run(shards):
    loader = pairs_loader(config(shards), max_steps=9, start_step=4)
    assert len(loader) == 9
    assert len(list(loader)) == 5


@pytest.mark.parametrize("world", [1, 2])
def test_validation_counts_each_sample_once_on_equal_ranks(shards, world):
    seen = []
    for rank in range(world):
        loader = pairs_loader(config(shards, eval_batch_size=16), rank=rank, world_size=world, split="val")
        found = list(loader)
        assert len(found) == 4
        assert all(len(batch["captions"]) == 16 // world for batch in found)
        seen += [
            key for batch in found for key, valid in zip(batch["keys"], batch["valid"], strict=True) if valid
        ]
    assert len(seen) == len(set(seen)) == 50


def test_bad_samples_are_replaced_counted_and_named(tmp_path):
    bad = {3: ({"jpg": b"<html>404</html>", "txt": b"x"}, "not an image"), 17: (None, "empty caption"),
           30: ({"jpg": jpeg("red")[:-10], "txt": b"x"}, "broken image"), 41: ({"txt": b"x"}, "no image")}  # fmt: skip
    for name, broken in (("clean", {}), ("broken", bad)):
        with ShardFile(tmp_path / name / "a.tar") as shard:
            for i in range(50):
                members = {"jpg": jpeg((5 * i, 0, 100)), "txt": f"caption {i}".encode()}
                if i in broken:
                    members = broken[i][0] or {**members, "txt": b"  \n"}
                shard.add(f"s{i:02d}", members)
    clean = batches(tmp_path / "clean", steps=6, max_skip_rate=1.0)
    for workers in (0, 2):
        loader = pairs_loader(
            config(tmp_path / "broken", workers=workers, max_skip_rate=1.0), seed=5, max_steps=6
        )
        found = list(loader)
        different = [
            key
            for batch, expected in zip(found, clean, strict=True)
            for a, key in zip(batch["captions"], expected["captions"], strict=True)
            if a != key
        ]
        positions = PairsPlan(loader.plan.shards, seed=loader.plan.seed).locate(np.arange(48)).tolist()
        expected_bad = [i for i in positions if i in bad]
        assert different == [f"caption {i}" for i in expected_bad]
        assert loader.report.seen == 48
        assert loader.report.counts == {bad[i][1]: 1 for i in expected_bad}
        assert all(f"a.tar/s{i:02d}" in loader.report.names[bad[i][1]][0] for i in expected_bad)
    loader = pairs_loader(config(tmp_path / "broken", max_skip_rate=0.02), seed=5, max_steps=100)
    with pytest.raises(SkipRateError, match=r"allowed share of 0.02 .*a\.tar/s.*interloom data verify"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_is_gone_stops_the_run_in_one_sentence(tmp_path, workers):
    with ShardFile(tmp_path / "a.tar") as shard:
        for i in range(50):
            shard.add(f"s{i}", {"jpg": jpeg("red"), "txt": b"x"})
    loader = pairs_loader(config(tmp_path, workers=workers), max_steps=3)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(SkipRateError, match="in a row cannot be used") as stop:
        list(loader)
    assert "Traceback" not in str(stop.value)


def test_other_data_are_refused_saying_what_changed(shards, tmp_path):
    loader = pairs_loader(config(shards), seed=1, max_steps=3)
    saved = loader.fingerprint()
    check_fingerprint(saved, pairs_loader(config(shards), seed=1, rank=1, world_size=2).fingerprint())
    with pytest.raises(ValueError, match="seed was"):
        check_fingerprint(saved, pairs_loader(config(shards), seed=2).fingerprint())
    with pytest.raises(ValueError, match="global_batch_size was 8 and is 16"):
        check_fingerprint(saved, pairs_loader(config(shards, batch_size=16), seed=1).fingerprint())
    with ShardWriter(tmp_path, samples_per_shard=11) as writer:
        for i in range(44):
            image = jpeg((5 * i, 255 - 5 * i, 101 if i == 13 else 100))
            writer.add(
                f"s{i:02d}", {"jpg": image, "txt": f"caption {i}".encode(), "json": b'{"nouns": ["n"]}'}
            )
    with pytest.raises(ValueError) as error:
        check_fingerprint(saved, pairs_loader(config(tmp_path), seed=1).fingerprint())
    assert "1 of shards removed (000004.tar); 1 of shards changed (000001.tar)" in str(error.value)


def test_joined_folders_keep_their_shards_apart(shards, tmp_path):
    with ShardWriter(tmp_path / "more", samples_per_shard=5) as writer:
        writer.add("x", {"jpg": jpeg("red"), "txt": b"x"})
    joined = ShardSet.open([shards, tmp_path / "more"])
    assert len(joined) == 51
    assert joined.shards[-1].name == "more/000000.tar"
    with pytest.raises(ValueError, match="expected distinct"):
        ShardSet.open([shards, shards])


def test_bad_numbers_are_refused(shards):
    for options, message in (
        ({"batch_size": 7}, "multiple of the number of ranks"),
        ({"fit": "squash"}, "expected 'crop' or 'stretch'"),
        ({"image_size": 0}, "image_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            pairs_loader(config(shards, **options), world_size=2)
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        pairs_loader(PairsConfig())


class SharedMemoryProbe:
    def __call__(self, positions):
        batch = empty_batch((4, 3), torch.uint8)
        return {"shared": batch.is_shared(), "values": batch.fill_(7)}


def test_worker_batches_lie_in_shared_memory_from_the_start(shards):
    plan = PairsPlan(ShardSet.open(shards))
    for workers in (0, 1):
        batch = next(iter(PlanLoader(plan, SharedMemoryProbe(), global_batch_size=4, workers=workers)))
        assert batch["shared"] == bool(workers)
        assert batch["values"].tolist() == [[7] * 3] * 4
