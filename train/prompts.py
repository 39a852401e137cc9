"""Prompts around a class name or a noun: CLIP's 80 ImageNet templates and the draws made from them.

The templates are those of Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision" (2021), section 3.1.4. GroupViT (Xu et al., 2022, section 3.3) makes K prompts an image from nouns of
its caption, each noun in a random template; an image with fewer nouns repeats its raw caption instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from .randomness import sample_generator

IMAGENET_TEMPLATES: tuple[str, ...] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

# The subset that GroupViT evaluates classification with.
CLASSIFICATION_TEMPLATES: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

SEGMENTATION_TEMPLATE = "a photo of a {}."


def draw_prompts(
    caption: str,
    nouns: Sequence[str],
    count: int,
    *,
    seed: int,
    step: int,
    sample_index: int,
    templates: Sequence[str] = IMAGENET_TEMPLATES,
) -> list[str]:
    """Draw ``count`` prompts for one sample: different nouns, each in a random template.

    A shortfall is filled with the raw caption. The draw depends on the arguments alone.
    """
    drawn = draw_noun_prompts(
        caption, nouns, count, seed=seed, step=step, sample_index=sample_index, templates=templates
    )
    return [prompt for _, prompt in drawn]


def draw_noun_prompts(
    caption: str,
    nouns: Sequence[str],
    count: int,
    *,
    seed: int,
    step: int,
    sample_index: int,
    templates: Sequence[str] = IMAGENET_TEMPLATES,
) -> list[tuple[str, str]]:
    """The draw of :func:`draw_prompts` with the noun that each prompt is about; the caption is about itself."""
    generator = sample_generator(seed, step, sample_index, "prompts")
    distinct = list(dict.fromkeys(nouns))
    chosen = [distinct[int(noun)] for noun in generator.permutation(len(distinct))[:count]]
    style = generator.integers(0, len(templates), size=count)
    prompts = [(noun, templates[int(style[i])].format(noun)) for i, noun in enumerate(chosen)]
    return prompts + [(caption, caption)] * (count - len(prompts))
