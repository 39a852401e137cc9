"""``interloom generate``: text and images in, the model's continuation out."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from ..checkpointing.load import load_for_generation
from ..messages import show
from .chat import IMAGE_MARK, converse, picture, turn_ends


def generate(
    prompt: Annotated[
        str, typer.Option(help="Text; <image> marks where the next --image stands, else they come first.")
    ] = "",
    image: Annotated[
        list[str] | None, typer.Option(help="Image file or web address; repeat for several.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Run directory, .ckpt, save_pretrained folder or hub id of an IDEFICS.")
    ] = "runs/idefics_demo/latest",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to write at most.", show_default="64")
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to write at least.", show_default="0")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the draw; 0 takes the most likely token.", show_default="0")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from this many most likely tokens; 0 for all.", show_default="50")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the tokens that hold this much probability.", show_default="1"),
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beam search, if above 1.", show_default="1")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages what was said before.", show_default="1")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End once this text was written; repeat for several.")
    ] = None,
    image_attention: Annotated[
        str, typer.Option(help="What a token sees: the latest image, or all_previous.")
    ] = "latest",
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the file's.")] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    chat: Annotated[
        bool, typer.Option(help="A dialogue: every line of the input is a turn, after --prompt if given.")
    ] = False,
    system: Annotated[str, typer.Option(help="With --chat: what the model is told before all turns.")] = "",
) -> None:
    """Continue a prompt of text and images, written as it comes; or hold a dialogue.

    What is not given here is as the checkpoint's generation_config.json says, and else as shown.
    """
    from ...models.idefics.generation.stopping import TextStreamer

    images = list(image or [])
    if system and not chat:
        raise ValueError("--system is given without --chat; give both, or put its words into --prompt.")
    items = [picture(name) for name in images] if chat else interleave(prompt, images)
    model, processor = load_for_generation(checkpoint, dtype, device)
    processor.fetch = fetch_image
    forbidden = [processor.tokenizer.find(t) for t in (IMAGE_MARK, "<fake_token_around_image>")]
    own = model.generation_config
    told = own.eos_token_id
    ends = list(model.config.eos_token_ids if told is None else [told] if isinstance(told, int) else told)
    utterance = processor.tokenizer.find("<end_of_utterance>")
    ends += [] if utterance is None else [utterance]
    if chat:
        ends += turn_ends(processor)
    if max_new_tokens is None and own.max_new_tokens is None and own.max_length is None:
        max_new_tokens = 64
    streaming = (num_beams or own.num_beams or 1) == 1 and not as_json

    def write(inputs: Any) -> tuple[list[int], str]:
        """New tokens and their text, which is shown unless all is to be JSON."""
        inputs = inputs.to(model.device)
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=None if temperature is None else temperature > 0,
            temperature=temperature or None,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            num_return_sequences=1,
            repetition_penalty=repetition_penalty,
            bad_words_ids=[
                *(own.bad_words_ids or ()),
                *([token] for token in forbidden if token is not None),
            ],
            eos_token_id=list(dict.fromkeys(ends)),
            stop_strings=stop or None,
            return_dict_in_generate=False,
            tokenizer=processor,
            generator=torch.Generator(device=model.device).manual_seed(seed),
            streamer=TextStreamer(processor, lambda piece: show(piece, end="")) if streaming else None,
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(new, skip_special_tokens=True)
        if not as_json:
            show("" if streaming else text)
        return new.tolist(), text

    if chat:
        turns = converse(processor, write, prompt, items, system, image_attention)
        if as_json:
            print(json.dumps({"turns": turns}))
        return
    inputs = processor([items], image_attention=image_attention)
    new, text = write(inputs)
    if as_json:
        print(json.dumps({"text": text, "prompt_tokens": int(inputs["input_ids"].shape[1]), "tokens": new}))


def interleave(prompt: str, images: list[str]) -> list[Any]:
    """Texts and pictures in reading order.

    Raises:
        ValueError: there is nothing, or more or fewer marks than images.
    """
    parts = prompt.split(IMAGE_MARK)
    if len(parts) == 1:
        items: list[Any] = [*images, prompt]
    elif len(parts) - 1 != len(images):
        raise ValueError(
            f"The prompt holds {len(parts) - 1} {IMAGE_MARK} but {len(images)} --image were given; give one "
            "for each."
        )
    else:
        items = [parts[0]]
        for name, text in zip(images, parts[1:], strict=True):
            items += [name, text]
    items = [item for item in items if item]
    if not items:
        raise ValueError("Nothing to continue; give --prompt, --image or both.")
    return [picture(item) if item in images else item for item in items]


def fetch_image(url: str) -> Image.Image:
    """Fetch a picture under the guards of ``interloom.train.data.download``.

    Raises:
        ValueError: it was refused or could not be had; the message says why.
    """
    from ...models.pictures import load_rgb
    from ..data.download import Fetcher

    found = next(iter(Fetcher().fetch([url])))
    if found.data is None:
        raise ValueError(f"{url} could not be fetched: {found.reason}.")
    return load_rgb(found.data, url)
