"""A tokenizer that speaks in turns, pictures of one colour, and shards read back."""

import io
import json

import pytest
from interloom.train.cli import main
from interloom.train.data.shards.reader import ShardReader, ShardSet
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
F, IMAGE, E = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
# As in Transformers: what the tag encloses are the assistant's words.
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<end_of_utterance>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<end_of_utterance>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def byte_tokenizer(folder, template=None, special=SPECIAL):
    """One token a byte, so that any text can be written by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": special[4:],
    }  # fmt: skip
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def png(colour, size=(200, 160)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "png")
    return stream.getvalue()


def colour_of(data):
    with Image.open(io.BytesIO(bytes(data))) as image:
        return image.convert("RGB").getpixel((5, 5))


def documents(source, out, tokenizer, *options):
    """Exit code of the command."""
    call = ["data", "documents", str(source), str(out), "--tokenizer", str(tokenizer), "--workers", "1"]
    return main([*call, *map(str, options)])


def stored(folder):
    """(text, document, colours) of every stored document."""
    from interloom.train.data.documents.tokenization import DocumentTokenizer

    shards = ShardSet.open([str(folder)], kind="documents")
    reader = ShardReader(shards)
    found = []
    for sample in range(len(shards)):
        record = reader.read(sample)
        content = record.json()
        members = sorted((int(e.split(".")[0]), d) for e, d in record.members.items() if e != "json")
        tokenizer = DocumentTokenizer(stored.tokenizer)
        found.append((tokenizer.decode(content["ids"]), content, [colour_of(d) for _, d in members]))
    return found


stored.tokenizer = None


def answers(content):
    """The texts of a stored dialogue's answers."""
    from interloom.train.data.documents.tokenization import DocumentTokenizer

    tokenizer = DocumentTokenizer(stored.tokenizer)
    return [tokenizer.decode(content["ids"][start:end]) for start, end in content["answers"]]


@pytest.fixture(scope="session")
def instruct(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("instruct"))
    stored.tokenizer = folder
    return folder
