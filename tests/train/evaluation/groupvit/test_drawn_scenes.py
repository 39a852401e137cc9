"""Scores of the demo: pixel counts against a slow reference, and a model that knows the answers scores 1."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interloom.models.groupvit import (
    GroupViTConfig,
    GroupViTModel,
    GroupViTProcessor,
    GroupViTTextConfig,
    GroupViTVisionConfig,
)
from interloom.train.data.drawn.backdrops import BACKDROP_NAMES
from interloom.train.data.drawn.objects import CLASS_NAMES
from interloom.train.data.drawn.pairs import VAL_SIZE, VAL_START, write_demo
from interloom.train.data.drawn.scenes import draw_scene
from interloom.train.evaluation.groupvit import drawn_scenes as demo
from interloom.train.evaluation.pictures.contact_sheet import draw_contact_sheet
from PIL import Image

SCENES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "demo"
    write_demo(out, train=1, val=SCENES, seed=0)
    return out


def small_model(processor, groups):
    torch.manual_seed(0)
    text = GroupViTTextConfig(
        vocab_size=processor.tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    vision = GroupViTVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        depths=[1, 0] if groups else [1],
        num_group_tokens=[groups, 0] if groups else [0],
        num_output_groups=[groups, groups] if groups else [0],
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
    )
    return GroupViTModel(
        GroupViTConfig(
            text_config=text, vision_config=vision, projection_dim=16, projection_intermediate_dim=16
        )
    )


@pytest.mark.parametrize("groups", [4, 0])
@pytest.mark.parametrize("background", ["named", "threshold"])
def test_any_model_is_scored_and_shown(folder, tmp_path, groups, background):
    processor = GroupViTProcessor.from_pretrained(folder / "tokenizer")
    model = small_model(processor, groups)
    metrics = demo.evaluate_demo(model, processor, folder, tmp_path, background=background, batch_size=3)
    assert 0.0 <= metrics["segmentation/miou"] < 0.4
    assert ("grouping/best_iou" in metrics) == (groups > 0)
    assert all(np.isfinite(value) for value in metrics.values())
    json.dumps(metrics)
    with Image.open(tmp_path / "segments.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 1500


def test_scores_do_not_depend_on_the_batch(folder, tmp_path):
    processor = GroupViTProcessor.from_pretrained(folder / "tokenizer")
    model = small_model(processor, 4)
    one, four = (
        demo.evaluate_demo(model, processor, folder, tmp_path, batch_size=size, sheet="") for size in (1, 4)
    )
    assert one == pytest.approx(four, abs=1e-6)


class OracleVision:
    """Every pixel is a patch, the true segments are the groups, and a group's state is its name's prompt."""

    embeddings = SimpleNamespace(patch=(1, 1))

    def __init__(self, scenes):
        classes, backdrops = len(CLASS_NAMES), len(BACKDROP_NAMES)
        masks = torch.stack([torch.from_numpy(scene.mask).long() for scene in scenes])
        self.soft = F.one_hot(masks, classes + 1).flatten(1, 2).transpose(1, 2).float()
        self.groups = torch.zeros(len(scenes), classes + 1, classes + backdrops)
        for groups, scene, mask in zip(self.groups, scenes, masks, strict=True):
            for class_id in mask.unique()[1:]:
                groups[class_id, class_id - 1] = 1.0
            groups[0, classes + BACKDROP_NAMES.index(scene.nouns[-1])] = 1.0

    def __call__(self, pixel_values, output_attentions):
        return SimpleNamespace(last_hidden_state=self.groups, attentions=(self.soft,))


class Oracle(torch.nn.Module):
    """Stands for a model that knows the answers; the shared space has one direction a name."""

    def __init__(self, scenes):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.text_projection = torch.nn.Identity()
        self.vision_model = OracleVision(scenes)

    def encode_text(self, input_ids):
        return torch.eye(len(input_ids))

    def project_groups(self, groups):
        return groups


def test_the_right_segments_with_the_right_names_score_one(folder, tmp_path):
    oracle = Oracle([draw_scene(0, VAL_START + i, VAL_SIZE) for i in range(SCENES)])
    processor = GroupViTProcessor.from_pretrained(folder / "tokenizer")
    processor.image_processor.size = {"shortest_edge": VAL_SIZE}
    processor.image_processor.crop_size = {"height": VAL_SIZE, "width": VAL_SIZE}
    metrics = demo.evaluate_demo(oracle, processor, folder, tmp_path, sheet="")
    assert metrics["segmentation/miou"] == 1.0
    assert metrics["grouping/best_iou"] == pytest.approx(1.0)
    assert metrics["classification/recall"] == 1.0


def test_counts_and_ratios_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (2, 5, 6), generator=generator)
    predicted = torch.randint(0, 4, (2, 5, 6), generator=generator)
    tally = demo.confusion(predicted, truth, 5)
    iou = demo.intersection_over_union(tally)
    for class_id in range(4):
        both = ((truth == class_id) & (predicted == class_id)).sum()
        either = ((truth == class_id) | (predicted == class_id)).sum()
        assert float(iou[class_id]) == pytest.approx(float(both / either))
    assert iou[4].isnan()


def test_background_by_name_and_by_threshold():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.2, 0.9], [0.5, 0.5, 0.4]])
    assert demo.name_segments(similarity, 2, "named", 0.9, 1.0).tolist() == [1, 0, 1]
    # softmax over two classes at scale 10: 0.9997, 0.73, 0.5
    assert demo.name_segments(similarity, 2, "threshold", 0.9, 10.0).tolist() == [1, 0, 0]


def test_errors_say_what_to_do(folder, tmp_path):
    processor = GroupViTProcessor.from_pretrained(folder / "tokenizer")
    model = small_model(processor, 4)
    with pytest.raises(FileNotFoundError, match="interloom data demo"):
        demo.evaluate_demo(model, processor, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="use 'named' or 'threshold'"):
        demo.evaluate_demo(model, processor, folder, tmp_path, background="none")
    (tmp_path / "demo").mkdir()
    for file in ("classes.txt", "backdrops.txt"):
        (tmp_path / "demo" / file).write_text((folder / file).read_text())
    (tmp_path / "demo" / "val").symlink_to(folder / "train")
    with pytest.raises(ValueError, match="has no mask"):
        demo.evaluate_demo(model, processor, tmp_path / "demo", tmp_path)


def test_a_sheet_takes_any_number_of_scenes(tmp_path):
    image = np.full((16, 16, 3), 120, np.uint8)
    mask = np.zeros((16, 16), np.int64)
    mask[4:9, 4:9] = 2
    path = tmp_path / "sheet.png"
    draw_contact_sheet([image] * 4, [mask] * 4, [mask] * 4, ["cat", "dog"], path, title="four", columns=2)
    with Image.open(path) as sheet:
        assert np.asarray(sheet).std() > 0
