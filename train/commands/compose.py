"""``interloom compose``: an IDEFICS from a language model and an image tower, ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..messages import show


def compose(
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    text: Annotated[
        str,
        typer.Option(
            metavar="SRC",
            help="Llama 1 to 3, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5 or Qwen3: folder, hub id or GGUF file.",
        ),
    ],
    vision: Annotated[
        str, typer.Option(metavar="SRC", help="Image tower: folder, hub id, or a run of GroupViT.")
    ],
    cross_layer_interval: Annotated[
        int | None,
        typer.Option(
            help="A gated block stands before the first layer and every this many; by default about eight."
        ),
    ] = None,
    resampler: Annotated[
        bool | None,
        typer.Option(
            "--resampler/--no-resampler",
            help="Reduce an image's vectors to --latents; by default with these, or above 64 of the tower's.",
        ),
    ] = None,
    latents: Annotated[
        int | None, typer.Option(help="Vectors that a resampler makes of an image; 64 by default.")
    ] = None,
    alpha: Annotated[
        str,
        typer.Option(
            help="A gate a block (float) or a channel (vector), at zero; or where a block's gate starts."
        ),
    ] = "float",
    qk_norm: Annotated[
        bool, typer.Option("--qk-norm/--no-qk-norm", help="Norms on queries and keys of what is added.")
    ] = True,
    end_of_utterance: Annotated[
        bool, typer.Option(help="Add <end_of_utterance>, which ends a turn of a dialogue.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for the language model's.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="What the new weights are drawn from.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Split weights above this size.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that is in OUT already.")] = False,
) -> None:
    """Compose an IDEFICS: it is the language model until it is trained, for its gates start at zero.

    \b
    A small one, on any machine:
      interloom compose --text SmolLM2-135M-Instruct.Q4_1.gguf --vision clip-vit-base-patch32 smollm2
    \b
    IDEFICS-9B as it began:
      interloom compose --text llama-7b --vision CLIP-ViT-H-14-laion2B-s32B-b79K idefics-9b
        --cross-layer-interval 4 --resampler --dtype bfloat16
    \b
    Llama 3.1 that reads the group tokens of a GroupViT trained here:
      interloom compose --text Llama-3.1-8B --vision runs/groupvit_gcc_yfcc/latest grouped --no-resampler
    """
    from ...models.idefics.composition.compose import ComposeOptions, Composition
    from ..checkpointing.load import dtype_named

    if destination.is_file():
        raise ValueError(f"{destination} is a file; give a folder to write.")
    if (destination / "config.json").exists() and not overwrite:
        raise ValueError(f"{destination} holds a checkpoint already; pass --overwrite to replace it.")
    if destination.is_dir() and not (destination / "config.json").exists() and any(destination.iterdir()):
        raise ValueError(f"{destination} holds files that are no checkpoint; give a new or an empty folder.")
    options = ComposeOptions(
        cross_layer_interval=cross_layer_interval,
        resampler=resampler,
        latents=latents,
        alpha=alpha,
        qk_norm=qk_norm,
        end_of_utterance=end_of_utterance,
        seed=seed,
        dtype=dtype_named(dtype),
    )
    made = Composition.of(text, vision, options)
    model = made.save(destination, max_shard_size=max_shard_size)
    config, token = model.config, made.processor.image_token_id
    count = sum(p.numel() for p in model.parameters())
    fresh = sum(p.numel() for p in model.model.gated_cross_attn_layers.parameters())
    vectors = f"all {config.vision_config.num_tokens} vectors of the tower"
    if config.use_resampler:
        vectors = f"{config.perceiver_config.resampler_n_latents} latents of a resampler"
    show(
        f"{destination}: {count:,} parameters, {fresh:,} of them in {config.gated_blocks} gated blocks "
        f"(cross_layer_interval {config.cross_layer_interval}, {config.num_hidden_layers} layers); an image is "
        f"{vectors}; <image> is token {token}"
    )
