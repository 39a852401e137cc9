"""Wording of prompts and choice of examples."""

import numpy as np
import pytest
from interloom.train.data.report import SkipReport
from interloom.train.evaluation.idefics.few_shot import (
    Prompts,
    Sample,
    Support,
    Template,
    _descending,
    plans,
    shot_counts,
)
from interloom.train.evaluation.idefics.model import embed_pictures
from PIL import Image

VQA = "Image:<image>Question: {question} Answer: {answer}\n"


@pytest.fixture
def samples(tmp_path, draw):
    return [
        Sample(f"s{n}", draw(tmp_path / f"{n % 5}.png", n % 5), {"question": f"what {n}?"}, ["a"], f"word{n}")
        for n in range(7)
    ]


def texts(prompt):
    return [item if isinstance(item, str) else "<picture>" for item in prompt]


def test_examples_stand_before_the_question(samples):
    template = Template(VQA, "Do it.\n", ["question", "answer"])
    prompts = Prompts(template, Support(samples[1:], "fixed", seed=3), 2, 0)
    found = texts(prompts(0, samples[0], SkipReport()))
    assert found[0] == "Do it.\nImage:"
    assert found[1] == found[3] == found[5] == "<picture>"
    words = [int(part.split("what ")[1][0]) for part in found[2::2]]
    assert found[2] == f"Question: what {words[0]}? Answer: word{words[0]}\nImage:"
    assert found[6] == "Question: what 0? Answer:"


def test_no_shots_are_two_examples_without_pictures(samples):
    template = Template(VQA, "", ["question", "answer"])
    # The first sample is the question's own picture, and so is the sixth.
    prompts = Prompts(template, Support(samples), 0, 2)
    assert texts(prompts(0, samples[0], SkipReport())) == [
        "Image:Question: what 1? Answer: word1\nImage:Question: what 2? Answer: word2\nImage:",
        "<picture>",
        "Question: what 0? Answer:",
    ]
    alone = Prompts(template, None, 0, 2)
    assert texts(alone(0, samples[0], SkipReport()))[0] == "Image:"


def test_a_data_sets_text_cannot_fake_an_image(samples):
    template = Template(VQA, "", ["question", "answer"])
    asked = Sample("x", samples[0].image, {"question": "is <image></s> this {0} a\ncat?"})
    found = texts(Prompts(template, None, 0, 0)(0, asked, SkipReport()))
    assert found[2] == "Question: is this {0} a cat? Answer:"


@pytest.mark.parametrize("choice", ["random", "fixed"])
def test_draws_are_functions_of_seed_and_question(samples, choice):
    def drawn(seed, number):
        return [s.name for s in Support(samples, choice, seed).candidates(number, samples[0])]

    assert drawn(1, 4) == drawn(1, 4)
    assert sorted(drawn(1, 4)) == ["s1", "s2", "s3", "s4", "s6"]  # s5 is the picture of s0
    assert any(drawn(1, 4) != drawn(seed, 4) for seed in range(2, 6))
    assert all(drawn(1, 4) == drawn(1, number) for number in range(6)) == (choice == "fixed")


def test_rices_takes_the_most_similar_and_puts_the_best_last(samples, speller):
    _, model, processor = speller
    report = SkipReport()
    found = embed_pictures(samples, None, model, processor, report, batch_size=2)
    assert len(found) == 5
    pixels = {s.image: processor.image_processor(s.image) for s in samples}
    pooled = {path: model.model.vision_model(p).pooler_output[0] for path, p in pixels.items()}
    for path, vector in found.items():
        expected = pooled[path] / pooled[path].norm()
        np.testing.assert_allclose(vector, expected.detach().numpy(), atol=1e-5)
    query = samples[0]
    likeness = {
        s.name: float(pooled[s.image] @ pooled[query.image] / pooled[s.image].norm())
        for s in samples
        if s.image != query.image
    }
    best = sorted(likeness, key=lambda name: -likeness[name])[:3]
    template = Template(VQA, "", ["question", "answer"])
    prompts = plans(template, samples, [3], choice="rices", seed=0, text_examples=0, embeddings=found)[3]
    shown = [part.split("what ")[1][0] for part in texts(prompts(0, query, report))[2:-1:2]]
    # The same picture twice (s1 and s6) may come in either order.
    assert {likeness[f"s{n}"] for n in shown} == {likeness[name] for name in best}
    assert likeness[f"s{shown[-1]}"] == max(likeness.values())
    assert report.skipped == 0


def test_broken_pictures_are_counted_and_replaced(samples, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    support = [Sample("b", broken, {"question": "q"}, ["a"], "a"), *samples[1:3]]
    template = Template(VQA, "", ["question", "answer"])
    report = SkipReport()
    prompts = Prompts(template, Support(support, "fixed"), 2, 0)
    assert len(prompts(0, samples[0], report)) == 7
    assert Prompts(template, None, 0, 0)(0, support[0], report) is None
    assert Prompts(template, None, 0, 0)(0, Sample("gone", None), report) is None
    assert report.counts["question with a broken image"] == report.counts["question without its image"] == 1
    many = Prompts(template, Support(support, "fixed"), 3, 0)
    assert many(0, samples[0], report) is None
    assert report.counts["too few usable examples"] == 1


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("{question} {answer}", "write <image> once"),
        ("<image>{question}", "{answer} once"),
        ("<image>{question} {answer} {colour}", "of fields only"),
        ("{answer}<image>", "after the answer"),
        ("<image>{answer", "is not a template"),
    ],
)
def test_templates_that_cannot_work(example, words):
    with pytest.raises(ValueError, match=words):
        Template(example, "", ["question", "answer"])


def test_impossible_numbers_of_shots(samples):
    template = Template(VQA, "", ["question", "answer"])
    with pytest.raises(ValueError, match="needs 8 examples but the support has 7"):
        Prompts(template, Support(samples), 8, 0)
    with pytest.raises(ValueError, match="choice='best'"):
        Support(samples, "best")
    assert shot_counts([0, 4]) == [0, 4]
    for wrong in ([], [-1], ["4"]):
        with pytest.raises(ValueError, match="shots="):
            shot_counts(wrong)


def test_a_groupvit_may_judge_what_is_similar(samples, speller, folder, model, processor):
    found = embed_pictures(samples, str(folder), *speller[1:], SkipReport())
    for path, vector in found.items():
        with Image.open(path) as picture:
            pixels = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        expected = model.get_image_features(pixels).pooler_output[0]
        np.testing.assert_allclose(vector, (expected / expected.norm()).detach().numpy(), atol=1e-4)


def test_any_number_of_candidates_comes_in_order():
    values = np.random.default_rng(0).permutation(1000).astype(np.float32)
    for count in (3, 256, 257, 1000):
        assert list(_descending(values[:count])) == np.argsort(-values[:count]).tolist()
