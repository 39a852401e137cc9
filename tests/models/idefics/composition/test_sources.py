"""What composing takes, what it makes of options and vocabularies, and what it refuses."""

import json
import shutil

import pytest
import torch
import transformers
from interloom.models import IdeficsForVisionText2Text, IdeficsProcessor
from interloom.models.idefics.composition.compose import ComposeOptions, Composition, compose
from interloom.models.idefics.composition.text_sources import read_text_source
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn

TOKENS = 97


@pytest.fixture(scope="module")
def llama(tmp_path_factory, write_text_of):
    folder = tmp_path_factory.mktemp("llama") / "model"
    return write_text_of(folder, "Llama"), folder


@pytest.fixture
def copied(llama, tmp_path):
    return shutil.copytree(llama[1], tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_added_starts_as_a_new_model_does(llama, clip_folder):
    options = ComposeOptions(resampler=True, latents=7, alpha="vector", end_of_utterance=True, qk_norm=False)
    model, processor = compose(llama[1], clip_folder, options)
    config = model.config
    assert (config.additional_vocab_size, config.total_vocab_size) == (3, TOKENS + 3)
    wanted = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    assert processor.tokenizer.convert_tokens_to_ids(wanted) == [TOKENS, TOKENS + 1, TOKENS + 2]
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.perceiver_config.resampler_n_latents == 7
    assert not hasattr(model.model.gated_cross_attn_layers[0].cross_attn, "q_layer_norm")
    for block in model.model.gated_cross_attn_layers:
        assert block.alpha_dense.shape == (1, 1, 32)
        assert not block.alpha_dense.any()
        assert not block.alpha_cross_attn.any()
        deviation = (0.4 / 32) ** 0.5
        assert block.mlp.gate_proj.weight.std().item() == pytest.approx(deviation, rel=0.15)
    embed, head = model.model.embed_tokens, model.lm_head
    torch.testing.assert_close(embed.additional_embedding.weight, embed.weight.mean(0).expand(3, -1))
    torch.testing.assert_close(head.additional_fc.weight, head.weight.mean(0).expand(3, -1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(x in n for x in ("gated", "perceiver", "additional")) for n in trained)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_options_say_how_the_parts_are_joined(llama, clip_folder):
    half = ComposeOptions(cross_layer_interval=3, dtype=torch.bfloat16, alpha=0.5, seed=4)
    model, _ = compose(llama[1], clip_folder, half)
    assert len(model.model.gated_cross_attn_layers) == 2  # before the first and the fourth of five
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.alpha_dense.item() for b in model.model.gated_cross_attn_layers} == {0.5}
    again, _ = compose(llama[1], clip_folder, half)
    other, _ = compose(
        llama[1], clip_folder, ComposeOptions(cross_layer_interval=3, dtype=torch.bfloat16, seed=5)
    )
    first = [m.model.gated_cross_attn_layers[0].mlp.up_proj.weight for m in (model, again, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    # Five vectors of an image need no resampler, and five layers a block each.
    default = Composition.of(llama[1], clip_folder).config
    assert (default.use_resampler, default.cross_layer_interval) == (False, 1)
    few = Composition.of(llama[1], clip_folder, ComposeOptions(latents=3)).config
    assert (few.use_resampler, few.perceiver_config.resampler_n_latents) == (True, 3)
    with pytest.raises(ValueError, match="made by a resampler, which is switched off"):
        ComposeOptions(latents=3, resampler=False)


def test_the_tower_is_the_source_s(llama, clip_folder):
    model, processor = compose(llama[1], clip_folder)
    theirs = transformers.CLIPVisionModel.from_pretrained(clip_folder).eval()
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found = model.model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, theirs(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert processor.image_processor.image_size == 28


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin", "headless"])
def test_every_form_of_a_folder(form, llama, clip_folder, tmp_path, write_text_of, write_tokenizer_of):
    folder = tmp_path / "form"
    theirs = llama[0]
    if form == "headless":  # the decoder alone, whose head is its embeddings
        theirs = write_text_of(tmp_path / "tied", "Llama", tie_word_embeddings=True)
        theirs.model.save_pretrained(folder)
    elif form == "sharded":
        theirs.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    else:
        theirs.config.save_pretrained(folder)
        state = dict(theirs.state_dict())
        if form == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            names = sorted(state)
            parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
            for file, held in parts.items():
                torch.save({name: state[name] for name in held}, folder / file)
            index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    write_tokenizer_of(folder)
    model, _ = compose(folder, clip_folder)
    ids = torch.randint(3, TOKENS, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits[..., :TOKENS], theirs(ids).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["WordLevel", "BPE", "Unigram"])
def test_embeddings_wider_than_the_tokenizer(kind, copied, clip_folder):
    """The image tokens' ids begin where the embeddings end; the tokens that were there keep theirs."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}
    model = {
        "WordLevel": lambda: models.WordLevel(words, unk_token="<unk>"),
        "BPE": lambda: models.BPE(words, [("a", "b")], unk_token="<unk>"),
        "Unigram": lambda: models.Unigram([(word, -float(i)) for word, i in words.items()], 0, False),
    }[kind]()
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    backend.save(str(copied / "tokenizer.json"))
    before = backend.encode("ab<|im_end|> b a").ids
    composition = Composition.of(copied, clip_folder)
    tokenizer = composition.processor.tokenizer
    assert tokenizer.find("<image>") == TOKENS + 1
    assert tokenizer.encode("ab<|im_end|> b a") == before
    assert composition.config.additional_vocab_size == 2
    assert len(tokenizer.get_vocab()) == TOKENS + 2


def test_tokens_beyond_the_base_vocabulary(copied, clip_folder):
    """A tokenizer to which its user added some: they join the additional vocabulary, before the image tokens."""
    backend = Tokenizer.from_file(str(copied / "tokenizer.json"))
    backend.add_special_tokens(["<pad>", "<|user|>"])
    backend.save(str(copied / "tokenizer.json"))
    edit(copied / "tokenizer_config.json", pad_token="<pad>", chat_template="{{ messages }}")
    model, processor = compose(copied, clip_folder)
    assert model.config.additional_vocab_size == 4
    assert model.config.pad_token_id == TOKENS
    assert processor.tokenizer.find("<image>") == TOKENS + 3
    assert processor.tokenizer.chat_template == "{{ messages }}"
    assert model(input_ids=torch.tensor([[1, TOKENS, TOKENS + 3]])).logits.shape[-1] == TOKENS + 4


def test_a_tokenizer_without_begin_and_padding_tokens(copied, clip_folder, tmp_path):
    words = {f"w{i}": i for i in range(TOKENS)}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(copied / "tokenizer.json"))
    (copied / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "eos_token": "w7", "pad_token": None, "unk_token": None})
    )
    edit(copied / "config.json", bos_token_id=None, eos_token_id=7)
    made = Composition.of(copied, clip_folder)
    made.save(tmp_path / "out")
    processor = IdeficsProcessor.from_pretrained(tmp_path / "out")
    tokenizer = processor.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "w7", "w7")
    assert (made.config.pad_token_id, made.config.eos_token_id) == (7, 7)
    batch = processor(text=[[torch.zeros(3, 28, 28), "w"]])
    assert batch["input_ids"][0, :3].tolist() == [TOKENS, TOKENS + 1, TOKENS]
    assert "w7" in tokenizer.all_special_tokens


def test_generation_settings_and_chat_template_are_carried(copied, clip_folder, tmp_path):
    (copied / "generation_config.json").write_text(json.dumps({"temperature": 0.4, "eos_token_id": [2, 5]}))
    (copied / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    Composition.of(copied, clip_folder).save(tmp_path / "out")
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path / "out")
    assert model.generation_config.settings["temperature"] == 0.4
    assert model.generation_config.settings["eos_token_id"] == [2, 5]
    assert "m.content" in IdeficsProcessor.from_pretrained(tmp_path / "out").tokenizer.chat_template


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, r"'gemma3_text' model; a text source is one of llama"),
        ({"model_type": None}, r"None model; a text source"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 6}, "missing weights"),
        ({"num_hidden_layers": 4}, "unknown weights"),
        ({"hidden_size": 64}, "misshapen|missing|unknown"),
        ({"vocab_size": 90}, "no room for the tokens of pictures"),
        ({"attention_bias": True}, "missing weights"),
        ({"hidden_act": "mish"}, "mish"),
        ({"num_hidden_layers": 10**9}, "need more than"),
    ],
)
def test_sources_that_are_none_are_refused_with_a_sentence(changes, message, copied, clip_folder, tmp_path):
    edit(copied / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        Composition.of(copied, clip_folder).save(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name not in ("copy",)]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer.json"),
    ],
)
def test_half_a_folder(missing, message, copied, clip_folder):
    (copied / missing).unlink()
    with pytest.raises(ValueError, match=message):
        compose(copied, clip_folder)


def test_a_cut_weights_file(copied, clip_folder, tmp_path):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        Composition.of(copied, clip_folder).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama 1", "llama grouped", "mistral without a window"])
def test_what_transformers_computes_is_exported_to_it(name, composed_of, clip_folder, texts, tmp_path):
    """Heads that each have their keys as they are, grouped ones expanded; images included."""
    (ids, mask), folder = texts, tmp_path / "out"
    model, processor = compose(composed_of(name).folder, clip_folder)
    for block in model.model.gated_cross_attn_layers:
        nn.init.constant_(block.alpha_cross_attn, 0.7)
        nn.init.constant_(block.alpha_dense, 0.4)
    model.save_pretrained(folder, for_transformers=True)
    processor.save_pretrained(folder)
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(folder).eval()
    pixels = torch.randn(2, 1, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    seen = torch.ones(2, 20, 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_attention_mask": seen}
    again = IdeficsForVisionText2Text.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(**inputs).logits[mask.bool()]
        torch.testing.assert_close(model(**inputs).logits[mask.bool()], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(**inputs).logits[mask.bool()], expected, atol=1e-4, rtol=1e-4)
    assert (
        again.config.model_type == json.loads((folder / "config.json").read_text())["model_type"] == "idefics"
    )
    assert load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].shape == (32, 32)
    if name != "llama 1":  # as it is, the model keeps its few heads and does not pass for Transformers'
        model.save_pretrained(tmp_path / "own")
        assert json.loads((tmp_path / "own/config.json").read_text())["model_type"] == "interloom_idefics"
        assert IdeficsForVisionText2Text.from_pretrained(tmp_path / "own").config.num_key_value_heads == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smollm2", "rope_theta of 100000"),
        ("linear", "rotary positions scaled by 'linear'"),
        ("llama with biases", "biases of the attention; no biases of the feed-forward"),
        ("mistral", r"head_dim of 16 .*; no sliding window of 5 tokens"),
        ("qwen3", "norms of queries and keys in the self-attention"),
        ("llama 1", "gated block every 2 of 5 layers"),
    ],
)
def test_what_it_does_not_have_is_refused(name, reason, composed_of, tmp_path):
    with pytest.raises(ValueError, match=reason):
        composed_of(name).ours.save_pretrained(tmp_path / "out", for_transformers=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="interloom_idefics"):
        transformers.AutoConfig.from_pretrained(composed_of(name).ours.save_pretrained(tmp_path) or tmp_path)


def test_a_source_says_what_it_is(llama):
    found = read_text_source(llama[1])
    assert found.settings["num_key_value_heads"] == 2
    assert found.stored > 10_000
