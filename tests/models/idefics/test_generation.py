"""Generation against Transformers' ``generate``, token by token."""

import pytest
import torch
import transformers
from interloom.models.idefics import StaticCache
from interloom.models.idefics.generation.sampling import SamplingOptions
from interloom.models.idefics.generation.stopping import TextStreamer
from transformers.generation import logits_process

STYLES = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.7},
    "minimum": {"min_new_tokens": 6, "eos_token_id": [5, 9, 17, 33]},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bans": {"bad_words_ids": [[5], [7, 8], [98]]},
    "beams": {"num_beams": 3},
    "long beams": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    "short beams": {"num_beams": 2, "length_penalty": -1.0, "early_stopping": True},
    "thorough beams": {"num_beams": 3, "early_stopping": "never", "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_sequences_equal_transformers(style, use_cache, pair_of, inputs_of):
    pair = pair_of()
    # Many end tokens, so that rows and beams end at different lengths.
    options = {
        "max_new_tokens": 10,
        "use_cache": use_cache,
        "eos_token_id": list(range(3, 30)),
        **STYLES[style],
    }
    inputs = inputs_of()
    ours = pair.ours.generate(**inputs, **options)
    theirs = pair.theirs.generate(**inputs, do_sample=False, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "changes", [{"use_resampler": False, "alpha_type": "float"}, {"cross_layer_interval": 1}]
)
@pytest.mark.parametrize("beams", [1, 3])
def test_other_models_equal_transformers(changes, beams, pair_of, inputs_of):
    pair = pair_of(**changes)
    inputs = inputs_of(left_padding=False)
    inputs["image_attention_mask"] = (torch.rand(2, 12, 3) > 0.3).long()  # several images a token
    ours = pair.ours.generate(**inputs, max_new_tokens=8, num_beams=beams)
    theirs = pair.theirs.generate(**inputs, max_new_tokens=8, num_beams=beams, do_sample=False)
    assert torch.equal(ours, theirs)


def test_draws_equal_transformers(pair_of, inputs_of):
    pair = pair_of()
    inputs = inputs_of()
    options = {
        "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.7, "max_new_tokens": 12,
    }  # fmt: skip
    torch.manual_seed(3)
    ours = pair.ours.generate(**inputs, **options)
    torch.manual_seed(3)
    theirs = pair.theirs.generate(**inputs, **options)
    assert torch.equal(ours, theirs)
    again = [
        pair.ours.generate(
            **inputs, **options, num_return_sequences=3, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    ]
    assert torch.equal(*again)
    assert again[0].shape[0] == 6


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"temperature": 0.3}, logits_process.TemperatureLogitsWarper(0.3)),
        ({"top_k": 7}, logits_process.TopKLogitsWarper(7)),
        ({"top_p": 0.6}, logits_process.TopPLogitsWarper(0.6)),
    ],
)
def test_each_warper_equals_transformers(options, theirs):
    scores, ids = torch.randn(4, 50), torch.randint(0, 50, (4, 6))
    ours = SamplingOptions(**{"do_sample": True, "top_k": 0, **options}).process(ids, scores)
    assert torch.equal(ours, theirs(ids, scores))


def test_padding_on_either_side_continues_like_the_prompt_alone(pair_of, inputs_of):
    pair = pair_of()
    inputs = inputs_of(left_padding=False)
    short = {
        "input_ids": inputs["input_ids"][:1, :9],
        "pixel_values": inputs["pixel_values"][:1],
        "image_attention_mask": inputs["image_attention_mask"][:1, :9],
    }
    alone = pair.ours.generate(**short, max_new_tokens=6)[0, 9:]
    for side in ("left", "right"):
        ids, mask = inputs["input_ids"].clone(), torch.ones(2, 12, dtype=torch.long)
        seen = inputs["image_attention_mask"].clone()
        real, pad = (slice(3, 12), slice(0, 3)) if side == "left" else (slice(0, 9), slice(9, 12))
        ids[0, real], seen[0, real] = short["input_ids"][0], short["image_attention_mask"][0]
        ids[0, pad], mask[0, pad], seen[0, pad] = 0, 0, 0
        for cached in (True, False):
            batch = pair.ours.generate(
                ids,
                mask,
                pixel_values=inputs["pixel_values"],
                image_attention_mask=seen,
                max_new_tokens=6,
                use_cache=cached,
            )
            assert torch.equal(batch[0, 12:], alone), (side, cached)


def test_text_alone_and_unseen_images(pair_of, inputs_of):
    pair = pair_of()
    inputs = inputs_of()
    text = pair.ours.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=6, num_beams=2)
    inputs["image_attention_mask"] = torch.zeros_like(inputs["image_attention_mask"])
    assert torch.equal(text, pair.ours.generate(**inputs, max_new_tokens=6, num_beams=2))
    assert torch.equal(text, pair.theirs.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False))


def test_one_row_sees_an_image_and_another_none(pair_of, inputs_of):
    pair = pair_of()
    inputs = inputs_of()
    inputs["image_attention_mask"][1] = 0
    ours = pair.ours.generate(**inputs, max_new_tokens=6)
    assert torch.equal(ours, pair.theirs.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_images_are_encoded_and_projected_once(pair_of, inputs_of):
    model = pair_of().ours
    calls = {"encoder": 0, "projection": 0}
    hooks = [
        model.model.vision_model.register_forward_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1)),
        model.model.gated_cross_attn_layers[0].cross_attn.k_proj.register_forward_hook(
            lambda *_: calls.update(projection=calls["projection"] + 1)
        ),
    ]
    model.generate(**inputs_of(), max_new_tokens=8)
    for hook in hooks:
        hook.remove()
    assert calls == {"encoder": 1, "projection": 1}


@pytest.mark.parametrize("images", [1, 3, 16])
def test_a_step_reads_one_image_however_many_there_are(images, pair_of, monkeypatch):
    """Counted, not timed: keys handed to cross-attention while decoding."""
    from interloom.models.idefics.cross_attention import IdeficsCrossAttention

    lengths = set()
    focused = IdeficsCrossAttention._focused

    def watch(self, query, context):
        lengths.add(context.focused.layers[self.index][0].shape[2])
        return focused(self, query, context)

    monkeypatch.setattr(IdeficsCrossAttention, "_focused", watch)
    seen = torch.zeros(1, 20, images, dtype=torch.long)
    seen[0, 18:, images - 1] = 1
    pair_of().ours.generate(
        torch.randint(3, 90, (1, 20)),
        pixel_values=torch.randn(1, images, 3, 28, 28),
        image_attention_mask=seen,
        max_new_tokens=4,
        eos_token_id=[],
    )
    assert lengths == {5}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_static_shapes_give_the_same_tokens(options, pair_of, inputs_of):
    model = pair_of().ours
    inputs = inputs_of()
    grown = model.generate(**inputs, max_new_tokens=10, **options)
    fixed = model.generate(**inputs, max_new_tokens=10, cache_implementation="static", **options)
    assert torch.equal(grown, fixed)


def test_a_compiled_step_is_one_graph(pair_of, inputs_of):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs = pair_of().ours, inputs_of()
    counter = CompileCounter()
    compiled = model.generate(
        **inputs,
        max_new_tokens=10,
        cache_implementation="static",
        compile={"backend": counter},
        eos_token_id=[],
    )
    assert counter.frame_count == 1
    assert torch.equal(compiled, model.generate(**inputs, max_new_tokens=10, eos_token_id=[]))


def test_the_forward_pass_takes_a_static_cache(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    cache = StaticCache(4, 16, batch_size=2)
    with torch.no_grad():
        whole = model(**inputs).logits
        first = {k: v[:, :8] if v.dim() < 5 else v for k, v in inputs.items()}
        parts = [model(**first, past_key_values=cache).logits]
        for t in range(8, 12):
            parts.append(
                model(
                    input_ids=inputs["input_ids"][:, t : t + 1],
                    image_attention_mask=inputs["image_attention_mask"][:, t : t + 1],
                    past_key_values=cache,
                ).logits
            )
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(97 + i % 26) for i in ids)


def test_stop_strings_and_streaming(pair_of, inputs_of):
    model = pair_of().ours
    inputs = {k: v[1:] for k, v in inputs_of().items()}
    free = model.generate(**inputs, max_new_tokens=12, eos_token_id=[])[0, 12:]
    text = Letters().decode(free.tolist())
    stop = text[3:5]
    expected = text[: text.index(stop) + 2]
    pieces = []
    stopped = model.generate(
        **inputs,
        max_new_tokens=12,
        eos_token_id=[],
        stop_strings=stop,
        tokenizer=Letters(),
        streamer=TextStreamer(Letters(), pieces.append),
    )
    assert Letters().decode(stopped[0, 12:].tolist()) == expected
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_a_streamer_of_transformers_works(pair_of, inputs_of):
    streamed = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            streamed.append("end")

    inputs = {k: v[1:] for k, v in inputs_of().items()}
    out = pair_of().ours.generate(**inputs, max_new_tokens=4, streamer=Streamer(), eos_token_id=[])
    assert streamed == [*out[0].tolist(), "end"]


def test_scores_and_lengths(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    out = model.generate(
        **inputs, max_length=16, eos_token_id=[], return_dict_in_generate=True, output_scores=True
    )
    assert out.sequences.shape == (2, 16)
    assert [s.argmax(-1).tolist() for s in out.scores] == out.sequences[:, 12:].T.tolist()
    beams = model.generate(**inputs, max_new_tokens=3, num_beams=2, return_dict_in_generate=True)
    assert beams.sequences_scores.shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": None}, "needs input_ids"),
        ({"max_length": 12}, "leaves no room"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"num_return_sequences": 2}, "one result"),
        ({"num_beams": 2, "num_return_sequences": 3}, "between 1 and num_beams"),
        ({"early_stopping": "soon", "num_beams": 2}, "early_stopping"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"cache_implementation": "paged"}, "cache_implementation"),
        ({"compile": True}, "static"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask"),
        ({"attention_mask": torch.zeros(2, 12)}, "whole prompt"),
    ],
)
def test_contradictions_are_refused(options, message, pair_of, inputs_of):
    with pytest.raises(ValueError, match=message):
        pair_of().ours.generate(**{**inputs_of(), **options})
