"""Templates and draws."""

from collections import Counter

from interloom.models.groupvit.templates import IMAGENET_TEMPLATES
from interloom.train.objectives.groupvit.prompts import draw_prompts

NOUNS = ["qdog", "qcat", "qtree", "qcar", "qdog"]


def draw(step: int = 0, index: int = 0, count: int = 3, nouns: list[str] = NOUNS, seed: int = 0) -> list[str]:
    return draw_prompts("the caption", nouns, count, seed=seed, step=step, position=index)


def noun_of(prompt: str) -> str:
    return next(noun for noun in NOUNS if f" {noun}" in prompt)


def test_there_are_eighty_different_templates_with_one_place_each() -> None:
    assert len(set(IMAGENET_TEMPLATES)) == 80
    assert all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)


def test_nouns_are_drawn_without_replacement() -> None:
    for index in range(50):
        drawn = [noun_of(prompt) for prompt in draw(index=index, count=4)]
        assert sorted(drawn) == ["qcar", "qcat", "qdog", "qtree"]


def test_a_shortfall_is_filled_with_the_raw_caption() -> None:
    assert draw(nouns=["qdog"])[1:] == ["the caption", "the caption"]
    assert draw(nouns=[]) == ["the caption"] * 3


def test_draws_depend_on_seed_step_and_sample_and_on_nothing_else() -> None:
    assert draw(step=3, index=7) == draw(step=3, index=7)
    others = [draw(step=4, index=7), draw(step=3, index=8), draw(step=3, index=7, seed=1)]
    assert all(other != draw(step=3, index=7) for other in others)


def test_nouns_and_templates_come_evenly() -> None:
    prompts = [prompt for index in range(1000) for prompt in draw(index=index, count=2)]
    nouns = Counter(noun_of(prompt) for prompt in prompts)
    assert all(abs(count - 500) < 100 for count in nouns.values())
    assert len({p.replace(f" {noun_of(p)}", " {}") for p in prompts}) == 80


def test_braces_in_a_noun_stay_as_they_are() -> None:
    assert all("{0}" in prompt for prompt in draw_prompts("c", ["a{0}b"], 1, seed=0, step=0, position=0))
