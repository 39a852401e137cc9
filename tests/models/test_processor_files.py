"""What a processor's files say survives being read and written."""

import json
import shutil
from pathlib import Path

import pytest
from interloom.models import GroupViTProcessor, IdeficsProcessor

FIXTURES = Path(__file__).parent.parent / "fixtures" / "transformers_437"
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.mark.parametrize(
    ("name", "kind", "file", "text"),
    [
        ("idefics", IdeficsProcessor, "chat_template.jinja", TEMPLATE),
        ("idefics", IdeficsProcessor, "chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        ("groupvit", GroupViTProcessor, "chat_template.jinja", TEMPLATE),
    ],
)
def test_sides_turns_and_the_template_of_dialogues_survive(tmp_path, name, kind, file, text):
    transformers = pytest.importorskip("transformers")
    source, written = tmp_path / "source", tmp_path / "written"
    shutil.copytree(FIXTURES / name, source)
    path = source / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "truncation_side": "left", "padding_side": "left"})
    )
    (source / file).write_text(text)
    turns = {"processor_class": "IdeficsProcessor", "add_end_of_utterance_token": False}
    (source / "processor_config.json").write_text(json.dumps(turns))
    kind.from_pretrained(source).save_pretrained(written)
    again = kind.from_pretrained(written)
    tokenizer = again.tokenizer
    assert (tokenizer.truncation_side, tokenizer.padding_side) == ("left", "left")
    assert tokenizer.chat_template == TEMPLATE
    theirs = transformers.AutoTokenizer.from_pretrained(written)
    assert (theirs.truncation_side, theirs.chat_template) == ("left", TEMPLATE)
    if name == "idefics":
        assert again.add_end_of_utterance_token is False
        images = transformers.IdeficsImageProcessor.from_pretrained(written)
        assert list(images.image_mean) == [0.5, 0.4, 0.3]


@pytest.mark.parametrize("name", ["./nothing/here", "-not a name-"])
def test_what_is_not_there_is_also_an_oserror(name):
    """As Transformers says it, whose scripts catch that."""
    with pytest.raises(OSError, match="does not exist") as caught:
        IdeficsProcessor.from_pretrained(name)
    assert isinstance(caught.value, ValueError)
