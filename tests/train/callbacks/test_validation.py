"""Validation while a run trains: its figures, that it moves nothing, and what best checkpoints and an early end do."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interloom.train.callbacks.validation import ValidationCallback
from interloom.train.checkpointing.folder import best_checkpoint, checkpoints_newest_first
from interloom.train.checkpointing.load import load_pretrained
from interloom.train.checkpointing.monitored import Best, mode_of
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.evaluation.groupvit.retrieval import evaluate_retrieval
from interloom.train.objectives.training_step import TrainingModule

STEPS = 6


def arguments(world, root, *extra):
    return [
        "train", *world.overrides, "name=run", f"runs_dir={root}", f"trainer.max_steps={STEPS}",
        "trainer.micro_batch_size=4", "model.config.vision_config.drop_path_rate=0.2",
        "callbacks.checkpoint.every_steps=3", "callbacks.checkpoint.keep=9", "optim.warmup_steps=2",
        "optim.lr=0.01", *extra,
    ]  # fmt: skip


def validated(world, root, *extra):
    return arguments(
        world, root, f"data.val=[{world.shards}]", "data.eval_batch_size=16",
        "callbacks.validation.every_steps=2", *extra,
    )  # fmt: skip


def table(root, name="run"):
    with open(root / name / "latest" / "metrics.csv", newline="") as file:
        return {int(row["step"]): {k: v for k, v in row.items() if v} for row in csv.DictReader(file)}


def figures(root, prefix="val/"):
    """Everything of metrics.csv that is no clock."""
    clocks = ("per_second", "tflops", "mfu")
    return {
        (step, name): value
        for step, row in table(root).items()
        for name, value in row.items()
        if name.startswith(prefix) and not name.endswith(clocks)
    }


def everything(root):
    """Weights, moments and averages of the last checkpoint."""
    path = checkpoints_newest_first(root / "run" / "latest" / "checkpoints")[0][1]
    state = torch.load(path, weights_only=True)
    found = dict(state["state_dict"]) | state.get("average", {}).get("tensors", {})
    for number, entry in state["optimizer_states"][0]["state"].items():
        found |= {f"{number}.{name}": value for name, value in entry.items()}
    return found, state["interloom"]


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert not [
        name for name in left if not torch.equal(torch.as_tensor(left[name]), torch.as_tensor(right[name]))
    ]


def test_a_run_ends_in_the_same_bits_with_and_without_validation(tiny_world, tmp_path):
    assert main(arguments(tiny_world, tmp_path / "blind", "optim.ema_decay=0.8")) == 0
    # Workers of the validation draw a seed from the global generator; monitors save more checkpoints.
    assert (
        main(
            validated(
                tiny_world,
                tmp_path / "seeing",
                "optim.ema_decay=0.8",
                "callbacks.checkpoint.monitor=val/loss",
            )
        )
        == 0
    )
    assert_same(everything(tmp_path / "blind")[0], everything(tmp_path / "seeing")[0])
    assert figures(tmp_path / "blind", "train/") == figures(tmp_path / "seeing", "train/")
    assert {step for step, name in figures(tmp_path / "seeing") if name == "val/loss"} == {2, 4, 6}


def test_figures_are_those_of_the_exported_model(tiny_world, tmp_path):
    """The loss by brute force in float64 on batches of 16 pairs, retrieval by the evaluation's own way."""
    run = validated(tiny_world, tmp_path, "model.multi_label=0", "optim.ema_decay=0.8")
    assert main(run) == 0
    last = {name: float(value) for name, value in table(tmp_path)[STEPS].items() if name.startswith("val/")}
    model, processor = load_pretrained(tmp_path / "run" / "latest" / "model")
    shards = ShardSet.open([str(tiny_world.shards)], kind="pairs")
    scores = evaluate_retrieval(model, processor, ShardReader(shards), range(40))
    assert last["val/image_to_text_r1"] == pytest.approx(scores["retrieval/image_to_text_r1"])
    assert last["val/text_to_image_r1"] == pytest.approx(scores["retrieval/text_to_image_r1"])
    from interloom.train.data.decode import decode_rgb

    records = [ShardReader(shards).read(number) for number in range(40)]
    images = [decode_rgb(record.members["png"], "") for record in records]
    texts = [bytes(record.members["txt"]).decode() for record in records]
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        ids = processor(text=texts, padding=True, return_tensors="pt")["input_ids"]
        image = F.normalize(model.visual_projection(model.encode_image(pixels)).double(), dim=-1)
        text = F.normalize(model.text_projection(model.encode_text(ids)).double(), dim=-1)
    total = 0.0
    for start in range(0, 40, 16):
        logits = image[start : start + 16] @ text[start : start + 16].T * model.logit_scale.double().exp()
        targets = torch.arange(len(logits))
        total += (
            len(logits)
            * float((F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)).detach())
            / 2
        )
    assert last["val/loss"] == pytest.approx(total / 40, rel=1e-4)


@pytest.mark.parametrize("objective", [pytest.param("image", marks=pytest.mark.faults), "groups"])
def test_two_ranks_find_what_one_finds(tiny_world, tmp_path, fork_ranks, objective):
    # Batches of 15 pairs cannot be shared by two, and 40 pairs are no multiple: each counts once all the same.
    settings = (
        "data.eval_batch_size=15", f"model.multi_label_objective={objective}", "trainer.max_steps=2",
        "trainer.micro_batch_size=null", "model.config.vision_config.drop_path_rate=0",
        "optim.lr=1e-6",
    )  # fmt: skip
    assert main(validated(tiny_world, tmp_path / "one", *settings)) == 0
    two = validated(
        tiny_world, tmp_path / "two", *settings, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"
    )
    os.environ["INTERLOOM_RUN_ID"] = "two"
    try:
        fork_ranks(lambda rank: succeed(two), 2)
    finally:
        del os.environ["INTERLOOM_RUN_ID"]
    one, other = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert one.keys() == other.keys()
    assert any(name == "val/multi_label_loss" for _, name in one)
    for name in one:
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4), name


def succeed(arguments):
    assert main(arguments) == 0


def worse_after(step):
    """A validation whose loss falls until a step and rises after it."""
    whole = ValidationCallback._scores

    def scores(self, trainer, module, now):
        found = whole(self, trainer, module, now)
        return found and {**found, "loss": abs(now - step) + 1.0}

    return scores


def test_the_best_checkpoint_is_kept_named_and_exported(tiny_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ValidationCallback, "_scores", worse_after(2))
    run = validated(
        tiny_world, tmp_path, "callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.keep=2",
        "callbacks.checkpoint.every_steps=1", "callbacks.checkpoint.export=best",
    )  # fmt: skip
    assert main(run) == 0
    latest = tmp_path / "run" / "latest"
    folder = latest / "checkpoints"
    assert [step for step, _ in checkpoints_newest_first(folder)] == [6, 5, 2]
    assert best_checkpoint(folder).name == "step-00000002.ckpt"
    scores = json.loads((latest / "metrics.json").read_text())
    assert scores["best/step"] == 2
    assert scores["best/val/loss"] == 1.0
    exported, _ = load_pretrained(latest / "model")
    for name in (latest / "best", tmp_path / "run" / "best", folder / "best.ckpt", folder / "best"):
        assert_same(load_pretrained(name)[0].state_dict(), exported.state_dict())
    last = load_pretrained(latest / "last")[0].state_dict()
    assert any(not torch.equal(last[name], value) for name, value in exported.state_dict().items())
    # Going on from the best one leads to the same end.
    before = everything(tmp_path)
    assert main([*run, "ckpt_path=best"]) == 0
    assert "continuing" in capsys.readouterr().err
    assert_same(everything(tmp_path)[0], before[0])
    assert everything(tmp_path)[1]["steering"] == before[1]["steering"]


def test_a_run_ends_early_and_stays_ended(tiny_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ValidationCallback, "_scores", worse_after(1))
    run = validated(
        tiny_world, tmp_path, "callbacks.validation.every_steps=1", "callbacks.early_stopping.monitor=val/loss",
        "callbacks.early_stopping.patience=2",
    )  # fmt: skip
    assert main(run) == 0
    assert "the run ends at step 3" in capsys.readouterr().err
    assert (tmp_path / "run" / "latest" / "model").is_dir()
    assert sorted(table(tmp_path)) == [1, 2, 3]
    before = everything(tmp_path)[0]
    assert main([*run, "ckpt_path=last"]) == 0
    assert_same(everything(tmp_path)[0], before)
    assert sorted(table(tmp_path)) == [1, 2, 3]


STEERED = (
    "callbacks.checkpoint.monitor=val/loss", "callbacks.early_stopping.monitor=val/image_to_text_r1",
    "callbacks.early_stopping.patience=9", "callbacks.checkpoint.every_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def steered(tiny_world, tmp_path_factory):
    root = tmp_path_factory.mktemp("steered")
    assert main(validated(tiny_world, root, *STEERED)) == 0
    return root


@pytest.mark.parametrize(
    "moment",
    [
        "in the validation",
        pytest.param("after it", marks=pytest.mark.faults),
        pytest.param("asked to stop in it", marks=pytest.mark.faults),
        "asked to stop before it",
    ],
)
def test_a_stopped_run_goes_on_exactly(tiny_world, tmp_path, steered, monkeypatch, moment):
    """Killed or asked to stop around the validation of step 4; best, patience and rows are those of the whole run."""
    whole = ValidationCallback._look
    before = TrainingModule.training_step

    def dies(self, trainer, module, **late):
        if trainer.global_step == 4 and moment == "in the validation":
            self.validation = dying
        if trainer.global_step == 4 and moment == "asked to stop in it":
            os.kill(os.getpid(), signal.SIGTERM)
        whole(self, trainer, module, **late)
        if trainer.global_step == 4 and moment == "after it":
            os._exit(9)

    def asked(self, batch, number):
        if self.trainer.global_step == 3 and moment == "asked to stop before it":
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, batch, number)

    def dying(module, go_on):
        os._exit(9)

    run = validated(tiny_world, tmp_path, *STEERED)
    child = os.fork()
    if not child:
        ValidationCallback._look = dies
        TrainingModule.training_step = asked
        os._exit(main(run))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (143 if "asked" in moment else 9)
    assert main([*run, "ckpt_path=last"]) == 0
    assert_same(everything(tmp_path)[0], everything(steered)[0])
    assert everything(tmp_path)[1]["steering"] == everything(steered)[1]["steering"]
    assert figures(tmp_path) == figures(steered)
    folders = [root / "run" / "latest" / "checkpoints" for root in (tmp_path, steered)]
    assert best_checkpoint(folders[0]).name == best_checkpoint(folders[1]).name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["callbacks.validation.every_steps=2"], "data.val, which is empty"),
        (["callbacks.checkpoint.monitor=val/loss"], "data.val, which is empty"),
        (["callbacks.checkpoint.export=best"], "monitor=val/loss"),
        (["callbacks.checkpoint.mode=least"], "use min or max"),
        (["callbacks.early_stopping.patience=0"], "1 or more validations"),
        (["data.val=[{}]", "callbacks.checkpoint.monitor=val/los"], "val/image_to_text_r1"),
        (["ckpt_path=best"], "no run below"),
        (["ckpt_path=there/best"], "there/best"),
    ],
)
def test_what_cannot_be_validated_is_said_at_once(tiny_world, tmp_path, capsys, settings, words):
    given = [setting.format(tiny_world.shards) for setting in settings]
    assert main(arguments(tiny_world, tmp_path, *given)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_forged_best_is_refused():
    best = Best("val/loss", mode_of("val/loss", None))
    assert best.mode == "min"
    assert mode_of("val/miou", None) == "max"
    assert [best.look(value, step) for step, value in enumerate((2.0, float("nan"), 1.0, 1.0))] == [
        True, False, True, False,
    ]  # fmt: skip
    assert not Best("val/loss", "max").resume(best.state(), 3)
    for change in ({"value": "low"}, {"step": 4}, {"since": -1}, {"value": float("inf")}):
        with pytest.raises(ValueError, match="give another checkpoint"):
            Best("val/loss", "min").resume({**best.state(), **change}, 3)


IDEFICS = (
    "model=idefics", "data=documents", "task=none", "name=run", "trainer=cpu", "trainer.max_steps=2",
    "data.workers=0", "data.image_size=32", "data.max_tokens=192", "data.max_images=8", "data.batch_size=2",
    "data.eval_batch_size=3", "data.crop_scale=null", "callbacks.progress=false", "callbacks.log_every=1",
    "model.config.vocab_size=128", "model.config.hidden_size=32", "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2", "model.config.pad_token_id=3",
    "model.config.cross_layer_interval=1", "model.config.use_resampler=false", "model.config.freeze_lm_head=false",
    "model.config.freeze_text_layers=false", "model.config.freeze_vision_layers=false",
    "model.config.alpha_initializer=ones",
    "model.config.vision_config.embed_dim=16", "model.config.vision_config.image_size=32",
    "model.config.vision_config.patch_size=16", "model.config.vision_config.intermediate_size=32",
    "model.config.vision_config.num_hidden_layers=1", "model.config.vision_config.num_attention_heads=2",
    "optim.lr=0.003",
)  # fmt: skip


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    write_demo(root / "demo", train=20, val=10, seed=1)
    return root / "demo"


def read_documents(root, demo, *extra):
    return [
        "train", *IDEFICS, f"runs_dir={root}", f"data.sources={{demo: [{demo / 'train'}]}}",
        f"data.val={{held: [{demo / 'val'}], seen: [{demo / 'train'}]}}", f"data.tokenizer={demo / 'tokenizer'}",
        *extra,
    ]  # fmt: skip


def test_documents_are_scored_by_source_with_and_without_images(documents, tmp_path):
    """Against every document alone, token by token in float64, and the answers against the evaluation's."""
    from interloom.models.idefics.image_mask import image_attention_mask
    from interloom.train.data.documents.tokenization import DocumentTokenizer
    from interloom.train.evaluation.idefics.grounding import answer, held_out, marked

    assert main(read_documents(tmp_path, documents, "callbacks.validation.every_steps=2")) == 0
    last = {name: float(value) for name, value in table(tmp_path)[2].items() if name.startswith("val/")}
    model, processor = load_pretrained(tmp_path / "run" / "latest" / "model")
    tokenizer = DocumentTokenizer(documents / "tokenizer")
    read = {
        "held": held_out(documents, tokenizer, 99),
        "seen": marked(ShardSet.open([str(documents / "train")], kind="documents"), tokenizer, 99),
    }
    assert [len(found) for found in read.values()] == [10, 20]
    image = tokenizer.encode_text("<image>")[0]
    sums = {}
    for name, found in read.items():
        for asked in found:
            ids = torch.tensor([asked.ids])
            seen = image_attention_mask(ids, image, None, len(asked.images)).bool()
            pixels = processor.image_processor(asked.images)[None]
            with torch.no_grad():
                for key, shown in (
                    ("loss", {"pixel_values": pixels, "image_attention_mask": seen}),
                    ("loss_without_images", {}),
                ):
                    logits = model(ids, **shown).logits.double()
                    nll = float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
                    for place in (f"val/{key}/{name}", f"val/{key}"):
                        total = sums.setdefault(place, [0.0, 0])
                        total[0] += nll
                        total[1] += ids.shape[1] - 1
    assert sums["val/loss"][0] != pytest.approx(sums["val/loss_without_images"][0], rel=1e-4)
    for place, (nll, count) in sums.items():
        assert last[place] == pytest.approx(nll / count, rel=1e-5), place
    asked = [document for found in read.values() for document in found]
    right, total = 0, 0
    for document, tokens in zip(
        asked, answer(model, processor.image_processor, asked, "right", 7), strict=True
    ):
        for (kind, position, _), token in zip(document.answers, tokens, strict=True):
            if kind in ("colour", "class"):
                right, total = right + (token == document.ids[position]), total + 1
    assert last["val/grounding"] == pytest.approx(right / total)


def test_documents_leave_the_bits_of_a_run(documents, tmp_path):
    blind = read_documents(tmp_path / "blind", documents)
    assert main(blind) == 0
    assert main(read_documents(tmp_path / "seeing", documents, "callbacks.validation.every_steps=1")) == 0
    assert_same(everything(tmp_path / "blind")[0], everything(tmp_path / "seeing")[0])


def test_scenes_with_masks_are_segmented(tmp_path, tiny_world):
    from interloom.train.objectives.groupvit.validation import scenes_beside

    assert scenes_beside([str(tiny_world.shards)]) is None
    assert main(["data", "demo", "--out", str(tmp_path / "demo"), "--train", "8", "--val", "6"]) == 0
    assert scenes_beside([str(tmp_path / "demo" / "val")]) == Path(tmp_path / "demo" / "val")


@pytest.mark.faults
@pytest.mark.parametrize("family", ["groupvit", "idefics"])
def test_shards_find_what_one_process_finds(tiny_world, documents, tmp_path, fork_ranks, monkeypatch, family):
    def run(root, *extra):
        if family == "groupvit":
            steady = (
                "model.config.vision_config.drop_path_rate=0",
                "data.eval_batch_size=15",
                "optim.ema_decay=0.5",
            )
            return validated(tiny_world, root, "trainer.max_steps=2", "optim.lr=1e-6", *steady, *extra)
        return read_documents(root, documents, "callbacks.validation.every_steps=1", "optim.lr=1e-6", *extra)

    # The processes are forked before this one has begun any thread of its own.
    two = run(tmp_path / "two", "trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2")
    monkeypatch.setenv("INTERLOOM_RUN_ID", "two")
    fork_ranks(lambda rank: succeed([item for item in two if item != "trainer=cpu"]), 2)
    monkeypatch.delenv("INTERLOOM_RUN_ID")
    assert main(run(tmp_path / "one")) == 0
    one, other = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert one.keys() == other.keys()
    for name in one:
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4), name
