"""GGUF files written as llama.cpp's conversion writes them, against the models and tokenizers they came from."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from interloom.models.idefics.composition.compose import compose
from interloom.models.idefics.composition.gguf_tokenizer import merges_of
from interloom.models.idefics.composition.text_sources import read_text_source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

gguf = pytest.importorskip("gguf")

TEXTS = [
    "The quick brown fox can't jump 12345 times over it's 3.14 dogs!",
    "  two  spaces\n\nand\tlines\r\n ",
    "café naïve 日本語 😀 don't",
    "x = f(y)[0] # comment",
    "",
]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def bytelevel_tokenizer(cut=None):
    """A small byte-level BPE, trained on the texts, whose words are cut as ``cut`` says."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 4, trainer)
    return backend


def permuted(weight, heads):
    """As the conversion orders the rows of LLaMA's queries and keys."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path, model, backend, architecture, *, quantise=None, pre="gpt-2", factors=None, **keys):
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for name, value in keys.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    described = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in described])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, weight in model.state_dict().items():
        value = weight.float().numpy()
        stem, _, kind = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if stem.startswith("model.layers."):
            _, _, block, part = stem.split(".", 3)
            if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                value = permuted(value, heads)
            target = f"blk.{block}.{NAMES[part]}.{kind}"
        else:
            target = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
                stem
            ]
            target = f"{target}.{kind}"
        if quantise is not None and value.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(kind, backend, **changes):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=backend.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "kind", "changes"),
    [
        ("llama", "Llama", {"attention_bias": True}),
        ("llama", "Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        ("llama", "Llama", {"head_dim": 24, "rms_norm_eps": 1e-5}),
        ("qwen2", "Qwen2", {}),
        ("qwen3", "Qwen3", {"head_dim": 24}),
    ],
)
@torch.no_grad()
def test_the_model_of_a_file_is_the_one_it_was_made_of(arch, kind, changes, clip_folder, tmp_path):
    backend = bytelevel_tokenizer()
    theirs = random_model(kind, backend, **changes)
    factors = None
    if changes.get("rope_parameters") is LLAMA3:
        plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2).float() / 16)
        factors = (plain / theirs.model.rotary_emb.inv_freq).numpy().astype(np.float32)
        assert factors.max() > 1  # it stretches something
    path = write_gguf(tmp_path / "model.gguf", theirs, backend, arch, factors=factors)
    model, processor = compose(path, clip_folder)
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    torch.testing.assert_close(
        model(input_ids=ids).logits[..., : expected.shape[-1]], expected, atol=2e-5, rtol=1e-5
    )
    assert model.config.max_position_embeddings == 512
    tokenizer = processor.tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, "<|im_end|>")
    assert tokenizer.chat_template == "{{ messages }}"


@torch.no_grad()
def test_quantised_weights_are_those_the_library_dequantises(clip_folder, tmp_path):
    backend = bytelevel_tokenizer()
    theirs = random_model("Qwen2", backend)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "model.gguf", theirs, backend, "qwen2", quantise=kind)
    for weight in theirs.parameters():
        if weight.ndim == 2:
            exact = weight.numpy()
            weight.copy_(torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind)))
    model, _ = compose(path, clip_folder)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    torch.testing.assert_close(
        model(input_ids=ids).logits[..., : expected.shape[-1]], expected, atol=2e-5, rtol=1e-5
    )
    # A folder that holds the one file is the same source.
    assert read_text_source(tmp_path).settings == read_text_source(path).settings


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_words_are_cut_as_the_models_own_tokenizers_do(pre, tmp_path):
    """Digits one by one, three by three, and so on, as the published tokenizers' expressions say."""
    backend = bytelevel_tokenizer()
    theirs = random_model("Qwen2", backend)
    found = read_text_source(write_gguf(tmp_path / "x.gguf", theirs, backend, "qwen2", pre=pre)).tokenizer
    words = [word for word, _ in found.backend.pre_tokenizer.pre_tokenize_str("I'LL pay 12345 €, OK?\n\n x")]
    spelt = decoders.ByteLevel()
    words = [spelt.decode([word]) for word in words]
    expected = {
        "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " €,", " OK", "?", "\n\n", " x"],
        "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", " €,", " OK", "?\n\n", " x"],
        "qwen2": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €,", " OK", "?\n\n", " x"],
    }[pre]
    assert words == expected


def test_sentencepiece_scores_become_merges():
    """Against the algorithm itself: merge the neighbours that make the best-scored piece, leftmost first."""
    generator = np.random.default_rng(0)
    letters = list("abc▁")
    pieces = dict.fromkeys(letters)
    while len(pieces) < 40:
        left, right = generator.choice(list(pieces), 2)
        if len(left + right) <= 6:
            pieces[left + right] = None
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    scores = [0.0] * 4 + [-float(x) for x in generator.permutation(len(pieces) - 4)]
    backend = Tokenizer(models.BPE(vocabulary, merges_of(vocabulary, scores)))
    for _ in range(200):
        text = "".join(generator.choice(letters, 12))
        parts = list(text)
        while True:
            pairs = [(scores[vocabulary[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts))
                     if a + b in vocabulary]  # fmt: skip
            if not pairs:
                break
            place = -max(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        assert backend.encode(text).tokens == parts


def test_a_llama_2_tokenizer(tmp_path):
    """SentencePiece pieces with bytes for what has none; a begin token; a space before the first word."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_embedding_length, 8), (writer.add_feed_forward_length, 8),
        (writer.add_head_count, 2),
    ):  # fmt: skip
        add(value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -1.5, -0.5, -1.2])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = read_text_source(tmp_path / "x.gguf").tokenizer
    ids = tokenizer.encode("ab é")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab é"
    assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<s>", "<unk>", "<unk>")


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("gemma3", {}, "holds a 'gemma3' model; GGUF files of llama, qwen2, qwen3"),
        ("qwen2", {"pre": "tekken"}, "cuts text into words by 'tekken'"),
        ("qwen2", {"expert_count": 8}, "qwen2 with expert_count"),
        ("qwen2", {"factors": np.full(8, 7.0, np.float32)}, "not Llama 3's"),
    ],
)
def test_files_that_are_no_source(arch, kwargs, message, tmp_path):
    backend = bytelevel_tokenizer()
    path = write_gguf(tmp_path / "x.gguf", random_model("Qwen2", backend), backend, arch, **kwargs)
    with pytest.raises(ValueError, match=message):
        read_text_source(path)


def test_damaged_files_and_a_missing_package(tmp_path, monkeypatch):
    backend = bytelevel_tokenizer()
    path = write_gguf(tmp_path / "x.gguf", random_model("Qwen2", backend), backend, "qwen2")
    whole = path.read_bytes()
    for length in (3, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.gguf is damaged"):
            read_text_source(path)
    path.write_bytes(whole)
    (tmp_path / "y.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        read_text_source(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf; install interloom\[gguf\]"):
        read_text_source(path)
