"""Prompts around a class name or a noun: CLIP's 80 ImageNet templates and the draws made from them.

The templates are those of Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision" (2021), section 3.1.4. GroupViT (Xu et al., 2022, section 3.3) makes K prompts an image from nouns of
its caption, each noun in a random template; an image with fewer nouns repeats its raw caption instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....models.groupvit.templates import IMAGENET_TEMPLATES
from ..randomness import sample_generator


def draw_prompts(
    caption: str,
    nouns: Sequence[str],
    count: int,
    *,
    seed: int,
    step: int,
    position: int,
    templates: Sequence[str] = IMAGENET_TEMPLATES,
) -> list[str]:
    """Draw ``count`` prompts for one sample: different nouns, each in a random template.

    A shortfall is filled with the raw caption. The draw depends on the arguments alone.
    """
    drawn = draw_noun_prompts(
        caption, nouns, count, seed=seed, step=step, position=position, templates=templates
    )
    return [prompt for _, prompt in drawn]


def draw_noun_prompts(
    caption: str,
    nouns: Sequence[str],
    count: int,
    *,
    seed: int,
    step: int,
    position: int,
    templates: Sequence[str] = IMAGENET_TEMPLATES,
) -> list[tuple[str, str]]:
    """The draw of :func:`draw_prompts` with the noun that each prompt is about; the caption is about itself."""
    generator = sample_generator(seed, step, position, "prompts")
    distinct = list(dict.fromkeys(nouns))
    chosen = [distinct[int(noun)] for noun in generator.permutation(len(distinct))[:count]]
    style = generator.integers(0, len(templates), size=count)
    prompts = [(noun, templates[int(style[i])].format(noun)) for i, noun in enumerate(chosen)]
    return prompts + [(caption, caption)] * (count - len(prompts))
