"""Classification by log-probability: the cached prompt against every text read whole."""

import copy
import json

import pytest
import torch
from interloom.train.cli import main
from interloom.train.data.report import SkipReport
from interloom.train.evaluation.idefics.few_shot import Prompts, Sample, Support, Template
from interloom.train.evaluation.idefics.log_probability import EXAMPLE, ClassScorer

NAMES = ["cat", "cat fish", "dog", "a very long name", "d"]


def whole_texts(model, processor, items, tail):
    """Log-probability of all tokens after the last picture, without cache, in float64."""
    before = processor([items])["input_ids"].shape[1]
    inputs = processor([[*items, tail]])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    likely = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    return sum(likely[place - 1, ids[place]] for place in range(before, len(ids)))


@torch.no_grad()
@pytest.mark.parametrize("example", [EXAMPLE, "<image>{class_name}", "Look:<image>a {class_name}\n"])
def test_cached_scores_equal_whole_texts(speller, tmp_path, draw, example):
    _, model, processor = speller
    exact = copy.deepcopy(model).double()
    samples = [Sample(str(n), draw(tmp_path / f"{n}.png", n), {}, [NAMES[n]], NAMES[n]) for n in range(4)]
    template = Template(example, "", ["class_name"])
    prompts = Prompts(template, Support(samples[:3], "fixed"), 2, 0)
    asked = [prompts(n, samples[n], SkipReport()) for n in (3, 0)]
    asked.append(Prompts(template, None, 0, 0)(0, samples[1], SkipReport()))  # of another length: padded
    scorer = ClassScorer(model, processor, template, NAMES, tokens_at_once=9)
    found = scorer(scorer.inputs(asked))
    for row, prompt in enumerate(asked):
        items = prompt[: -1 if isinstance(prompt[-1], str) else None]
        tails = [example.partition("<image>")[2].strip().format(class_name=name) for name in NAMES]
        expected = torch.stack([whole_texts(exact, processor, items, tail) for tail in tails])
        # What all classes share is left out: a constant.
        difference = (found[row] - expected).double()
        torch.testing.assert_close(difference, difference.mean().expand(5), rtol=0, atol=2e-4)


def folders(root, draw):
    for split, count in (("val", 3), ("train", 2)):
        for label, name in enumerate(("cat", "dog", "red_bird")):
            for n in range(count):
                draw(root / split / name / f"{n}.png", 10 * label + n + 100 * (split == "val"))
    return root


def test_classes_are_the_most_likely_names_on_one_and_two_ranks(speller, tmp_path, draw, on_ranks, capsys):
    data = folders(tmp_path / "c", draw)
    (data / "val" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    arguments = [f"checkpoint={speller[0]}", f"data={data}", "task.shots=[0,1]", "task.batch_size=2"]
    arguments += ["task.choice=rices", "task.text_examples=0"]
    assert main(["eval", "task=classification", *arguments, f"runs_dir={tmp_path / 'one'}"]) == 0
    assert "classification/top1_1_shots" in capsys.readouterr().out
    again = ["eval", "task=classification", *arguments, f"runs_dir={tmp_path / 'two'}"]
    assert on_ranks(lambda: main(again), 2) == [0, 0]
    one, two = (
        json.loads((tmp_path / name / "eval_classification" / "latest" / "metrics.json").read_text())
        for name in ("one", "two")
    )
    assert one == two
    assert one["classification/images_0_shots"] == one["classification/images_1_shots"] == 8
    _, model, processor = speller
    exact, hits = copy.deepcopy(model).double(), 0
    for path in sorted((data / "val").rglob("*.png")):
        if path.parent.name == "dog" and path.name == "1.png":
            continue
        tails = {name: f"a photo of a {name.replace('_', ' ')}." for name in ("cat", "dog", "red_bird")}
        with torch.no_grad():
            scores = {n: float(whole_texts(exact, processor, [path], tail)) for n, tail in tails.items()}
        hits += max(scores, key=scores.__getitem__) == path.parent.name
    assert one["classification/top1_0_shots"] == pytest.approx(hits / 8)
    assert one["classification/top5_0_shots"] == 1.0
    assert one["classification/chance"] == pytest.approx(1 / 3)


def test_support_of_other_classes_is_refused(speller, tmp_path, draw, capsys):
    data = folders(tmp_path / "c", draw)
    draw(data / "train" / "fish" / "0.png", 5)
    call = [
        "eval",
        "task=classification",
        f"checkpoint={speller[0]}",
        f"data={data}",
        f"runs_dir={tmp_path / 'r'}",
    ]
    assert main([*call, "task.shots=1"]) == 2
    assert "the evaluated classes lack (fish)" in capsys.readouterr().err
