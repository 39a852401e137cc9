"""The sliding-window protocol against a literal transcription, the layouts of the benchmarks, and the command."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interloom.train.cli import main
from interloom.train.evaluation.groupvit.embeddings import class_embeddings, templates_named
from interloom.train.evaluation.groupvit.labels import read_labels, split_labels
from interloom.train.evaluation.groupvit.metrics import accuracy, confusion, recall, segmentation_scores
from interloom.train.evaluation.groupvit.segmentation import default_protocol, evaluate_segmentation
from interloom.train.evaluation.groupvit.segmentation_data import open_segmentation
from interloom.train.evaluation.groupvit.sliding import Protocol, scaled_size, segment_image, windows
from PIL import Image


def literal(model, image, classes, protocol, mean, std):
    """The released protocol step by step with loops, one window at a time, pixels on their own."""
    height, width = image.shape[:2]
    scale = min(protocol.short_side / min(height, width), protocol.long_side / max(height, width))
    new = int(height * scale + 0.5), int(width * scale + 0.5)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=new, mode="bilinear", align_corners=False).round() / 255
    x = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    background = protocol.threshold is not None
    preds = torch.zeros(len(classes) + background, *new)
    count = torch.zeros(new)
    crop, stride = protocol.window, protocol.stride
    for row in range(max(new[0] - crop + stride - 1, 0) // stride + 1):
        for column in range(max(new[1] - crop + stride - 1, 0) // stride + 1):
            y2, x2 = min(row * stride + crop, new[0]), min(column * stride + crop, new[1])
            y1, x1 = max(y2 - crop, 0), max(x2 - crop, 0)
            part = x[:, :, y1:y2, x1:x2]
            out = model.vision_model(part, output_attentions=True)
            masks = out.attentions[0].permute(0, 2, 1)
            for attention in out.attentions[1:]:
                masks = masks @ attention.permute(0, 2, 1)
            grid = part.shape[2] // 4, part.shape[3] // 4
            maps = masks[0].T.reshape(1, -1, *grid)
            maps = F.interpolate(maps, size=part.shape[2:], mode="bilinear", align_corners=False)[0]
            one_hot = F.one_hot(maps.argmax(0), maps.shape[0]).float()
            tokens = model.visual_projection(out.last_hidden_state[0])
            tokens = tokens / tokens.norm(dim=-1, keepdim=True)
            mean_feature = model.visual_projection(out.last_hidden_state.mean(1))[0]
            mean_feature = mean_feature / mean_feature.norm()
            multiplier = min(math.exp(model.logit_scale), 100)
            affinity = tokens @ classes.T * multiplier
            before = affinity.softmax(-1)
            top = (mean_feature @ classes.T * multiplier).softmax(-1).topk(min(5, len(classes))).indices
            struck = [c for c in range(len(classes)) if c not in top.tolist()]
            affinity[:, struck] = -math.inf
            affinity = affinity.softmax(-1) * before
            scores = one_hot @ affinity
            if background:
                limit = min(protocol.threshold, affinity.max().item())
                preds[0, y1:y2, x1:x2] += (scores.max(-1).values < limit).float()
            preds[background:, y1:y2, x1:x2] += scores.permute(2, 0, 1)
            count[y1:y2, x1:x2] += 1
    preds = F.interpolate((preds / count)[None], size=(height, width), mode="bilinear", align_corners=False)[
        0
    ]
    return preds.softmax(0).argmax(0)


@pytest.mark.parametrize("threshold", [0.95, 0.2, None])
@pytest.mark.parametrize("size", [(40, 60), (70, 33), (24, 24)])
@torch.no_grad()
def test_protocol_equals_its_transcription(model, processor, size, threshold):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    names = ["cat", "dog", "bird", "car", "tree", "bus", "photo"]
    classes = class_embeddings(model, processor, names, ("a photo of a {}.",))
    protocol = Protocol(short_side=32, window=32, stride=16, threshold=threshold)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    found = segment_image(model, image, classes, protocol, mean, std)
    expected = literal(model, image, classes, protocol, mean, std)
    assert found.shape == size
    assert (found == expected).float().mean() > 0.999


def test_extreme_shapes_and_single_class(model, processor):
    classes = class_embeddings(model, processor, ["cat"], ("{}",))
    image = np.zeros((6, 90, 3), np.uint8)
    protocol = Protocol(short_side=32, long_side=64, window=32, stride=16, threshold=0.5)
    out = segment_image(model, image, classes, protocol, torch.zeros(3), torch.ones(3))
    assert out.shape == (6, 90)
    with pytest.raises(ValueError, match="expected uint8 RGB"):
        segment_image(model, image[..., :2], classes, protocol, torch.zeros(3), torch.ones(3))


def test_windows_cover_everything_and_stay_inside():
    for size in ((448, 597), (448, 448), (300, 448), (500, 1200)):
        seen = np.zeros(size, int)
        for rows, columns in windows(size, 448, 224):
            assert rows.stop - rows.start == min(448, size[0])
            assert columns.stop - columns.start == min(448, size[1])
            seen[rows, columns] += 1
        assert seen.min() >= 1
    assert scaled_size((375, 500), 448, 2048) == (448, 597)
    assert scaled_size((100, 1000), 448, 2048) == (205, 2048)


def test_class_embeddings_average_before_they_normalise(model, processor):
    templates = ("a photo of a {}.", "{}")
    found = class_embeddings(model, processor, ["cat", "dog"], templates)
    for index, name in enumerate(("cat", "dog")):
        raw = []
        for template in templates:
            ids = processor(text=template.format(name), return_tensors="pt")["input_ids"]
            raw.append(model.get_text_features(ids).pooler_output[0])
        mean = torch.stack(raw).mean(0)
        torch.testing.assert_close(found[index], mean / mean.norm(), atol=1e-5, rtol=1e-4)
    assert len(templates_named("full")) == 80
    assert len(templates_named("subset")) == 7
    assert templates_named("one {}") == ("one {}",)
    with pytest.raises(ValueError, match="templates='some'"):
        templates_named("some")


def test_scores_against_hand_counts():
    truth = torch.tensor([[0, 1, 1], [2, 2, 255]])
    predicted = torch.tensor([[0, 1, 2], [2, 2, 1]])
    scores = segmentation_scores(confusion(predicted, truth, 4), ["background", "cat", "dog", "bird"])
    assert scores == pytest.approx(
        {
            "segmentation/miou": (1 + 1 / 2 + 2 / 3) / 3,
            "segmentation/pixel_accuracy": 4 / 5,
            "segmentation/iou/background": 1.0,
            "segmentation/iou/cat": 1 / 2,
            "segmentation/iou/dog": 2 / 3,
        }
    )
    with pytest.raises(ValueError, match="class 2, but there are 2 classes"):
        confusion(predicted, truth, 2)
    ranks = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.1]])
    assert accuracy(ranks, torch.tensor([2, 0]), (1, 2)) == {1: 0.5, 2: 1.0}
    assert recall(ranks, [{0}, {1, 2}], (1, 2, 3)) == {1: 0.0, 2: 0.5, 3: 1.0}


def test_miou_equals_torchmetrics():
    from torchmetrics.segmentation import MeanIoU

    torch.manual_seed(0)
    truth, predicted = torch.randint(0, 5, (4, 20, 20)), torch.randint(0, 5, (4, 20, 20))
    metric = MeanIoU(num_classes=5, per_class=True, input_format="index")
    metric.update(predicted.flatten()[None], truth.flatten()[None])
    scores = segmentation_scores(confusion(predicted, truth, 5), list("abcde"))
    assert scores["segmentation/miou"] == pytest.approx(metric.compute().mean().item(), abs=1e-6)


def write_image(path, rng, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "RGB":
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(path)
        return
    ids = rng.integers(0, 21, (24, 32), dtype=np.uint8)
    ids[0] = 255
    mask = Image.fromarray(ids, mode="L")
    if mode == "P":
        mask = Image.fromarray(ids, mode="P")
        mask.putpalette([i % 256 for i in range(768)])
    mask.save(path)


def make_layout(root, kind):
    rng = np.random.default_rng(0)
    if kind == "coco_object":
        for name in ("000000000001", "000000000002"):
            write_image(root / "images" / "val2017" / f"{name}.jpg", rng)
        write_image(root / "annotations" / "val2017" / "000000000001_instanceTrainIds.png", rng, "L")
        stuff = np.full((24, 32), 91, np.uint8)
        stuff[:6], stuff[6:12], stuff[12:13] = 0, 89, 12
        Image.fromarray(stuff).save(root / "annotations" / "val2017" / "000000000002.png")
        return
    masks, split = {
        "voc": ("SegmentationClass", "Segmentation"),
        "context": ("SegmentationClassContext", "SegmentationContext"),
    }[kind]
    for name in ("2007_000033", "2007_000042"):
        write_image(root / "JPEGImages" / f"{name}.jpg", rng)
        write_image(root / masks / f"{name}.png", rng, "P")
    listing = root / "ImageSets" / split / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("2007_000042\n2007_000033\n")


@pytest.mark.parametrize(
    ("kind", "classes", "threshold"), [("voc", 21, 0.95), ("context", 60, 0.35), ("coco_object", 81, 0.95)]
)
def test_layouts_are_recognised(tmp_path, kind, classes, threshold):
    make_layout(tmp_path / "data", kind)
    scenes = open_segmentation(tmp_path / "data")
    assert (scenes.kind, len(scenes.classes), scenes.threshold, len(scenes)) == (kind, classes, threshold, 2)
    assert scenes.classes[0] == "background"
    found = list(scenes)
    assert all(s.image.shape == (24, 32, 3) and s.mask.shape == (24, 32) for s in found)
    if kind == "voc":
        assert [s.name for s in found] == ["2007_000042", "2007_000033"]
        assert open_segmentation(tmp_path / "data", "voc").classes == scenes.classes
    if kind == "coco_object":
        assert found[1].mask[0, 0] == 1  # person
        assert found[1].mask[6, 0] == 80  # toothbrush, 89 in COCO-Stuff
        assert found[1].mask[12, 0] == 12  # stop sign: the 11 is unused
        assert found[1].mask[20, 0] == 0  # stuff


def test_pascal_is_found_below_vocdevkit(tmp_path):
    make_layout(tmp_path / "VOC2012", "voc")
    assert open_segmentation(tmp_path).kind == "voc"


def test_evaluation_of_shards(shards, model, processor):
    scenes = open_segmentation(shards)
    assert scenes.kind == "shards"
    assert scenes.classes == ["background", "cat", "dog", "bird"]
    scores = evaluate_segmentation(model, processor, scenes, protocol=default_protocol(16))
    assert scores["segmentation/images"] == 6
    assert 0 <= scores["segmentation/miou"] <= 1
    limited = evaluate_segmentation(model, processor, scenes, protocol=default_protocol(16), limit=2)
    assert limited["segmentation/images"] == 2


def test_defaults_are_those_published():
    assert default_protocol(224) == Protocol(448, 2048, 448, 224, 5, 0.95)
    assert default_protocol(64).short_side == 64


def test_labels(tmp_path):
    assert len(read_labels("imagenet")) == 1000
    assert split_labels("cat, dog,cat") == ["cat", "dog"]
    (tmp_path / "names.txt").write_text("# pets\n\ncat\nguinea pig\n")
    assert split_labels(str(tmp_path / "names.txt")) == ["cat", "guinea pig"]
    assert len(split_labels("voc")) == 20
    with pytest.raises(ValueError, match="labels is empty"):
        split_labels(" , ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{image}", "--labels", "{tmp}/none.txt"], "the label file {tmp}/none.txt does not exist"),
        (["{tmp}/none.jpg", "--labels", "cat"], "the image {tmp}/none.jpg does not exist"),
        (["{tmp}/text.jpg", "--labels", "cat"], "text.jpg"),
        (["{image}", "--labels", "cat", "--checkpoint", "{tmp}/nothing"], "does not exist"),
        (["{image}", "--labels", "cat", "--checkpoint", "{tmp}/other"], "'clip'"),
        (["{image}", "--labels", "cat", "--out", "{tmp}/overlay.xyz"], "no image suffix"),
        (["{image}", "--labels", "cat", "--out", "{tmp}/none/overlay.png"], "make it first"),
        (["{image}", "--labels", "cat", "--threshold", "1.5"], "threshold=1.5"),
        (["{image}", "--labels", ","], "labels is empty"),
    ],
)
def test_command_refuses_in_one_sentence(tmp_path, folder, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_image(tmp_path / "image.png", rng)
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    before = {path.name for path in tmp_path.iterdir()}
    names = {"tmp": str(tmp_path), "image": str(tmp_path / "image.png")}
    call = ["segment", *(a.format(**names) for a in arguments)]
    if "--checkpoint" not in call:
        call += ["--checkpoint", str(folder)]
    assert main(call) == 2
    error = capsys.readouterr().err.strip()
    assert words.format(**names) in error
    assert len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_command_writes_an_overlay_with_a_legend(tmp_path, folder, capsys, suffix):
    write_image(tmp_path / "image.png", np.random.default_rng(0))
    out = tmp_path / f"overlay.{suffix}"
    call = ["segment", str(tmp_path / "image.png"), "--labels", "cat,dog", "--out", str(out)]
    assert main([*call, "--checkpoint", str(folder), "--threshold", "0"]) == 0
    with Image.open(out) as picture:
        assert picture.height > picture.width * 24 / 32  # the legend is below
    text = capsys.readouterr().out
    assert str(out) in text
    assert "cat" in text or "dog" in text
    rest = ["--checkpoint", str(folder), "--threshold", "0", "--background", "dog"]
    assert main(["segment", str(tmp_path / "image.png"), "--labels", "cat", "--out", str(out), *rest]) == 0
    assert "dog" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"image.png", out.name}
