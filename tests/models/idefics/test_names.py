"""What users of Transformers call by name: tokenizer, processor, configurations, ``from_pretrained``, outputs."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from interloom.models import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor, IdeficsVisionConfig
from interloom.models.idefics import IdeficsImageProcessor
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils import _pytree as pytree

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]


@pytest.fixture(scope="module")
def theirs():
    """A byte-less tokenizer that puts ``<s>`` before a text, as LLaMA's does."""
    letters = SPECIAL + [chr(c) for c in range(32, 127)] + ["\n"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        additional_special_tokens=SPECIAL[3:],
    )


@pytest.fixture(scope="module")
def processor(theirs):
    return IdeficsProcessor(IdeficsImageProcessor(28), theirs)


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 40, 3), dtype=np.uint8))


CALLS = [
    {},
    {"padding": True},
    {"padding": True, "return_tensors": "pt", "add_special_tokens": False},
    {"padding": "max_length", "max_length": 9, "truncation": True},
    {"padding": True, "return_tensors": "np", "pad_to_multiple_of": 4, "padding_side": "right"},
]


@pytest.mark.parametrize("text", ["ab", ["ab", "abcdefghijkl"]])
@pytest.mark.parametrize("options", CALLS)
def test_the_tokenizer_is_called_as_theirs(text, options, theirs, processor):
    ours, other = processor.tokenizer(text, **options), theirs(text, **options)
    for name in ("input_ids", "attention_mask"):
        assert type(ours[name]) is type(other[name])
        assert np.array_equal(np.asarray(ours[name], object), np.asarray(other[name], object)), name


def test_single_texts_and_ids(theirs, processor):
    ours = processor.tokenizer
    assert ours.encode("hello") == theirs.encode("hello")
    assert ours.encode("hello", add_special_tokens=False) == theirs.encode("hello", add_special_tokens=False)
    ids = theirs.encode("so <image> it is")
    for given in (ids, torch.tensor(ids), np.asarray(ids)):
        assert ours.decode(given) == theirs.decode(ids)
        assert ours.decode(given, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.batch_decode([ids, ids[:3]]) == theirs.batch_decode([ids, ids[:3]])
    for tokens in ("<image>", "nothing", ["a", "<image>"]):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_ids_to_tokens([4, 9]) == theirs.convert_ids_to_tokens([4, 9])
    assert ours.tokenize("a b") == theirs.tokenize("a b")
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    spaced = ours.encode("well , it does n't", add_special_tokens=False)
    assert ours.decode(spaced, clean_up_tokenization_spaces=True) == "well, it doesn't"
    assert ours.decode(spaced, clean_up_tokenization_spaces=False) == "well , it does n't"
    rows = [{"input_ids": [5, 6]}, {"input_ids": [5, 6, 7]}]
    padded = theirs.pad(rows, return_tensors="pt")
    assert torch.equal(ours.pad(rows, return_tensors="pt")["input_ids"], padded["input_ids"])


def test_the_task_guide_runs(processor, pair_of):
    model = pair_of().ours
    # Transformers' guide, but for the web addresses: nothing is fetched unless the processor is told how to.
    inputs = processor([picture(), "This is an image of "], return_tensors="pt").to(model.device)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=99)
    bad_words_ids = processor.tokenizer(SPECIAL[3:], add_special_tokens=False).input_ids
    assert bad_words_ids == [[3], [4]]
    ids = model.generate(**inputs, max_new_tokens=6, bad_words_ids=bad_words_ids)
    new = ids[:, inputs.input_ids.shape[1] :]
    assert not torch.isin(new, torch.tensor([3, 4])).any()
    assert isinstance(processor.batch_decode(ids, skip_special_tokens=True)[0], str)


def test_batches_cast_what_is_floating_alone(processor):
    batch = processor([["a", picture()]])
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.pixel_values.dtype == torch.bfloat16
    assert moved.input_ids.dtype == moved.image_attention_mask.dtype == torch.int64
    assert processor([["a", picture()]]).to(dtype=torch.float16).pixel_values.dtype == torch.float16
    with pytest.raises(ValueError, match="a device, a dtype"):
        batch.to(3.5)
    arrays = processor([["a", picture()]], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    assert np.array_equal(arrays["input_ids"], batch["input_ids"])
    assert pickle.loads(pickle.dumps(arrays))["input_ids"].shape == arrays["input_ids"].shape
    with pytest.raises(ValueError, match="another framework"):
        processor([["a"]], return_tensors="tf")


@pytest.mark.parametrize("name", ["my photo.jpg", "a.PNG", "photos of 3 dogs.webp"])
def test_the_path_of_a_picture_is_a_picture_or_an_error(name, tmp_path, processor, monkeypatch):
    folder = tmp_path / "documents" / "pictures"
    folder.mkdir(parents=True)
    picture().save(folder / name, "PNG")
    monkeypatch.chdir(tmp_path)
    expected = processor([["User:", folder / name]])
    for path in (f"documents/pictures/{name}", str(folder / name)):
        batch = processor([["User:", path]])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    for path in (f"documents/{name}", "gone.jpg", "./my gone photo.png"):
        with pytest.raises(ValueError, match="not there"):
            processor([["User:", path]])
    for text in ("Please say what is in photo.jpg", "photo.jpg\n", "and/or", "a jpg"):
        assert not processor([["User:", text]])["pixel_values"].any()


def test_the_image_processor_alone(tmp_path):
    images = IdeficsImageProcessor(image_size=28)
    pixels = images(picture())
    assert torch.equal(images.preprocess([picture()], return_tensors="pt"), pixels)
    assert images(picture(), return_tensors="np").shape == (1, 3, 28, 28)
    assert images(picture(), image_size=14).shape == (1, 3, 14, 14)
    picture().save(tmp_path / "a.png")
    assert torch.equal(images(images.fetch_images([tmp_path / "a.png"])), pixels)
    with pytest.raises(ValueError, match="fetched"):
        images.fetch_images("https://example.com/a.png")
    with pytest.raises(ValueError, match="sharpen"):
        images(picture(), sharpen=True)
    images.save_pretrained(tmp_path)
    assert IdeficsImageProcessor.from_pretrained(tmp_path).to_dict() == images.to_dict()
    assert IdeficsImageProcessor.from_dict(images.to_dict(), image_size=42).image_size == 42


def test_configurations_keep_common_keywords(settings_of, tmp_path):
    common = {
        "max_position_embeddings": 77,
        "output_attentions": True,
        "num_labels": 3,
        "of_a_user": {"a": 1},
    }
    config = IdeficsConfig(**settings_of(), **common)
    theirs = transformers.IdeficsConfig(**settings_of(), **common)
    for name in ("max_position_embeddings", "output_attentions", "of_a_user"):
        assert getattr(config, name) == getattr(theirs, name)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["max_position_embeddings"] == 77
    assert IdeficsVisionConfig.from_pretrained(tmp_path) == config.vision_config
    assert IdeficsVisionConfig(hidden_size=64).embed_dim == 64
    with pytest.warns(UserWarning, match="did you mean hidden_size"):
        IdeficsConfig(hiden_size=64)
    with pytest.raises(ValueError, match="head_dim"):
        IdeficsConfig(head_dim=3)


def test_a_function_as_activation(settings_of, tmp_path):
    named = IdeficsForVisionText2Text(IdeficsConfig(**settings_of(hidden_act="relu"))).eval()
    given = IdeficsForVisionText2Text(IdeficsConfig(**settings_of(hidden_act=torch.relu))).eval()
    given.load_state_dict(named.state_dict())
    ids = torch.arange(8)[None]
    assert torch.equal(named(ids).logits, given(ids).logits)
    with pytest.raises(ValueError, match="by its name"):
        given.save_pretrained(tmp_path)


@pytest.mark.parametrize("exception", ["IdeficsMLP", "IdeficsRMSNorm", "Linear", torch.nn.Linear])
def test_freeze_exceptions_by_class(exception, settings_of):
    values = settings_of(freeze_text_layers=True, freeze_text_module_exceptions=[exception])
    model = IdeficsForVisionText2Text(IdeficsConfig(**values)).model
    name = exception if isinstance(exception, str) else exception.__name__
    for path, module in model.layers.named_modules():
        for weight in module.parameters(recurse=False):
            parents = [model.layers.get_submodule(path.rsplit(".", n)[0]) for n in range(path.count(".") + 1)]
            assert weight.requires_grad == any(type(part).__name__ == name for part in (module, *parents)), (
                path
            )


def test_from_pretrained_keywords(pair_of, inputs_of, tmp_path):
    model, inputs = pair_of().ours, inputs_of()
    model.save_pretrained(tmp_path / "repo" / "inner", max_shard_size="40KB")
    assert (tmp_path / "repo" / "inner" / "model.safetensors.index.json").exists()
    load = IdeficsForVisionText2Text.from_pretrained
    back, info = load(
        tmp_path / "repo", subfolder="inner", torch_dtype=torch.float32, device_map={"": "cpu"},
        low_cpu_mem_usage=True, attn_implementation="sdpa", output_loading_info=True, use_cache=False,
    )  # fmt: skip
    assert not any(info.values())
    assert back.config.use_cache is False
    assert torch.equal(back(**inputs).logits, model(**inputs).logits)
    assert (
        load(tmp_path / "repo" / "inner", device_map="auto", torch_dtype="bfloat16").dtype == torch.bfloat16
    )
    # In place of the sharded files, one that older programs read.
    model.save_pretrained(
        tmp_path / "repo" / "inner", safe_serialization=False, state_dict=model.state_dict()
    )
    assert sorted(p.name for p in (tmp_path / "repo" / "inner").iterdir()) == [
        "config.json",
        "pytorch_model.bin",
    ]
    assert torch.equal(load(tmp_path / "repo" / "inner")(**inputs).logits, model(**inputs).logits)
    wider, info = load(
        tmp_path / "repo" / "inner", additional_vocab_size=5, ignore_mismatched_sizes=True,
        output_loading_info=True,
    )  # fmt: skip
    assert len(info["mismatched_keys"]) == 2
    assert torch.equal(wider.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert wider(torch.tensor([[101]])).logits.shape[-1] == 102
    sizes = model.push_to_hub("owner/name", dry_run=True)
    assert sizes.keys() == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cach": False}, "use_cach"),
        ({"load_in_4bit": True}, "quantise"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, "one device"),
        ({"device_map": "auto", "device": "cpu"}, "one of them"),
        ({"attn_implementation": "flash_attention_9"}, "flash_attention_9"),
        ({"additional_vocab_size": 5}, "misshapen"),
        ({"subfolder": "nowhere"}, "nowhere"),
    ],
)
def test_from_pretrained_refuses(options, message, pair_of, tmp_path):
    pair_of().ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        IdeficsForVisionText2Text.from_pretrained(tmp_path, **options)


def test_arrays_dictionaries_and_lists_as_inputs(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    expected = model(**inputs).logits
    arrays = {name: value.numpy() for name, value in inputs.items()}
    assert torch.equal(model(**arrays).logits, expected)
    assert torch.equal(model(arrays).logits, expected)
    assert torch.equal(model(inputs, token_type_ids=None, training=False).logits, expected)
    pair = [inputs["input_ids"], inputs["attention_mask"]]
    assert torch.equal(model(pair).logits, model(*pair).logits)
    assert torch.equal(model.generate(**arrays, max_new_tokens=2), model.generate(**inputs, max_new_tokens=2))
    with pytest.raises(ValueError, match="unknown inputs pixels"):
        model({**inputs, "pixels": inputs["pixel_values"]})


def test_outputs_are_trees_and_pickle(pair_of, inputs_of):
    output = pair_of().ours(**inputs_of(), labels=inputs_of()["input_ids"])
    leaves, tree = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, tree)
    assert type(again) is type(output)
    for other in (again, pickle.loads(pickle.dumps(output)), copy.copy(output)):
        assert other.keys() == output.keys()
        assert torch.equal(other.loss, output.loss)
        assert torch.equal(other.logits, output.logits)
    again["loss"] = None
    assert "loss" not in again


def test_counting_and_resizing(pair_of):
    pair = pair_of()
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        ours, theirs = pair.ours.num_parameters(**options), pair.theirs.num_parameters(**options)
        # Their count leaves the added tokens' rows in.
        assert ours == theirs or options
    model = copy.deepcopy(pair.ours)
    tables = 100 * 32 + sum(
        p.numel() for p in model.model.vision_model.embeddings.position_embedding.parameters()
    )
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == tables
    assert model.get_memory_footprint() >= 4 * model.num_parameters()
    assert model.resize_token_embeddings(101, pad_to_multiple_of=64).num_embeddings == 128
    assert model(torch.tensor([[127]])).logits.shape[-1] == 128
    assert model.resize_token_embeddings().num_embeddings == 128
