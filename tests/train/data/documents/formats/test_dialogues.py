"""The assistant's words are those of Transformers' templates; nothing that a user says becomes a label."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interloom.models.idefics.chat import INSTRUCT_TEMPLATE, ChatTemplate
from interloom.train.data.documents.dataset import DocumentsConfig, documents_loader
from interloom.train.data.documents.dialogues import DialogueWriter
from interloom.train.data.documents.formats import FORMATS
from interloom.train.data.documents.order import DocumentsPlan, ShardDocuments
from interloom.train.data.documents.packing import Answers, Lengths
from interloom.train.data.documents.tokenization import DocumentTokenizer
from interloom.train.data.documents.truncation import kept_tokens
from interloom.train.data.report import BadSample
from interloom.train.data.shards.reader import ShardSet

from .conftest import IMAGE as I
from .conftest import MARKED, E, F, answers, byte_tokenizer, documents, png, stored

# As published for SmolLM2-Instruct and its like; it marks nothing.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = CHATML.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}",
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", F, I, E, "<|im_start|>", "<|im_end|>"]
_letters = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="<>")
words = st.text(_letters, min_size=1, max_size=12).filter(str.strip)
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4)


def document(talk, system=None):
    turns = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in talk:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return FORMATS["messages"].read({"messages": turns}, "k", None), turns


@pytest.fixture(scope="module", params=["own", "chatml", "instruct"])
def spoken(request, tmp_path_factory):
    """(writer, tokenizer of Transformers with a template that marks the answers, whether its content is a list)."""
    from transformers import PreTrainedTokenizerFast

    template = {"own": MARKED, "chatml": CHATML, "instruct": None}[request.param]
    folder = byte_tokenizer(tmp_path_factory.mktemp(request.param), template, SPECIAL)
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    oracle.chat_template = {"own": MARKED, "chatml": CHATML_MARKED, "instruct": INSTRUCT_TEMPLATE}[
        request.param
    ]
    return DialogueWriter(DocumentTokenizer(folder)), oracle, request.param == "instruct"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=talks, system=st.none() | words)
def test_tokens_and_answers_are_those_of_transformers(spoken, talk, system):
    writer, oracle, parts = spoken
    read, turns = document(talk, system)
    if parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    wanted = oracle.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    made = writer.encode(read)
    assert made.ids == wanted["input_ids"]
    mask = [0] * len(made.ids)
    for start, end in made.answers:
        mask[start:end] = [1] * (end - start)
    assert mask == wanted["assistant_masks"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=talks, other=st.lists(words, min_size=4, max_size=4))
def test_other_words_of_the_user_change_no_label(spoken, talk, other):
    writer, *_ = spoken
    changed = [(new, answer) for new, (_, answer) in zip(other, talk, strict=False)]
    labels = []
    for version in (talk, changed):
        made = writer.encode(document(version)[0])
        labels.append([made.ids[start:end] for start, end in made.answers])
    assert labels[0] == labels[1]


def test_a_token_that_holds_part_of_an_answer_counts_whole():
    from interloom.models.idefics.chat import tokens_of

    offsets = [
        (0, 2),
        (2, 2),
        (2, 4),
        (4, 5),
        (4, 5),
        (5, 6),
    ]  # one without characters, a letter of two bytes
    assert tokens_of(offsets, [(1, 3), (4, 5), (6, 9)]) == [(0, 3), (3, 5)]


def test_pictures_are_written_once_however_the_template_writes_them():
    whole = "{{ '<fake_token_around_image><image><fake_token_around_image>' }}"
    bare = "{{ '<image>' }}"
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "so?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    for written in (whole, bare):
        template = (
            "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'image' %}" + written
            + "{% else %}{{ p.text }}{% endif %}{% endfor %};{% endfor %}"
        )  # fmt: skip
        made = ChatTemplate(template, {}, "x").write(turns)
        assert made.text == f"user:{F}{I}{F}{I}{F}so?;assistant:yes;"
        assert [made.text[start:end] for start, end in made.answers] == ["yes;"]


ONLY = (
    "{{% for m in messages %}}{{% if m.role {} 'assistant' %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ONLY.format("!="), "leaves out the assistant's words"),
        (ONLY.format("=="), "leaves out a user's picture or words"),
        (
            "{% for m in messages %}{{ m.content.nothing }}{% endfor %}",
            "leaves out a user's picture or words",
        ),
        ("{% include 'secrets' %}", "asks for another file"),
        ("{% for m in messages %}", "cannot be read"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_drops_a_role_or_breaks_is_one_sentence(tmp_path, capsys, template, said):
    folder = byte_tokenizer(tmp_path / "tokenizer", template)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": talk}))
    assert documents(tmp_path / "a.jsonl", tmp_path / "out", folder) == 2
    *_, sentence = capsys.readouterr().err.strip().split("\n")
    assert sentence.startswith("error: the chat template of ")
    assert said in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("refuses", ["drops", "raises"])
def test_a_template_without_system_turns_costs_only_dialogues_that_have_one(tmp_path, refuses):
    body = "{{ raise_exception('no system role') }}" if refuses == "raises" else ""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        + body
        + "{% else %}{{ m.role ~ ':' ~ m.content }}"
        "{% endif %}{% endfor %}"
    )
    folder = byte_tokenizer(tmp_path / "tokenizer", template)
    writer = DialogueWriter(DocumentTokenizer(folder))
    writer.encode(document([("a", "b")])[0])
    with pytest.raises(BadSample, match="chat template leaves out the system's words"):
        writer.encode(document([("a", "b")], "be kind")[0])


def test_dialogues_are_shortened_after_a_whole_answer_never_in_a_picture():
    #                   question, answers at 10..20, 30..40; pictures at 2 and 24 of three tokens
    lengths = Lengths(
        *(np.array(x) for x in ([50], [2, 24], [0, 2])),
        Answers(*(np.array(x) for x in ([10, 30], [20, 40], [0, 2]))),
    )
    kept = {
        limit: int(kept_tokens(lengths, limit, 9)[0]) for limit in (8, 10, 11, 15, 20, 25, 39, 40, 49, 50, 99)
    }
    assert kept == {8: 0, 10: 0, 11: 11, 15: 15, 20: 20, 25: 20, 39: 20, 40: 40, 49: 40, 50: 50, 99: 50}
    assert int(kept_tokens(lengths, 99, 1)[0]) == 20  # the second picture is one too many


def conversations(tmp_path, count, picture=True):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png((255, 0, 0)))
    records = []
    for number in range(count):
        talk = []
        for turn in range(1 + number % 4):
            mark = "<image>\n" if picture and turn == 0 else ""
            talk.append(
                {"from": "human", "value": f"{mark}question {number} {turn} " + "x" * (7 * number % 41)}
            )
            talk.append({"from": "gpt", "value": f"answer {number} {turn}"})
        records.append({"image": "a.png" if picture else None, "conversations": talk})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "a.jsonl"


def test_dialogues_stay_whole_in_training(tmp_path, instruct, capsys):
    source, out = conversations(tmp_path, 40), tmp_path / "out"
    assert (
        documents(source, out, instruct, "--image-root", tmp_path / "pictures", "--records-per-shard", 16)
        == 0
    )
    whole = [content for _, content, _ in stored(out)]
    shards = ShardDocuments(ShardSet.open([str(out)], kind="documents"))
    for limit in (96, 128, 200):
        plan = DocumentsPlan({"a": shards}, max_tokens=limit, max_images=3, window_documents=16, seed=1)
        for epoch in range(2):
            size = int(plan.streams[0].epoch(epoch).firsts[-1])
            first = 0 if epoch == 0 else int(plan.streams[0].epoch(0).firsts[-1])
            pieces = [p for n in range(size) for *_, p in plan.sequence(plan.locate([first + n])[0])]
            assert all(piece.start == 0 for piece in pieces)
            assert len(pieces) + (plan.dialogues["left out"]) == 40
        config = DocumentsConfig(
            sources={"a": [str(out)]}, tokenizer=str(instruct), batch_size=len(plan), workers=0, image_size=16,
            crop_scale=None, max_tokens=limit, max_images=3, window_documents=16, predict="answers",
        )  # fmt: skip
        batch = next(iter(documents_loader(config, seed=1, max_steps=1)))
        said = capsys.readouterr().err
        assert ("are shortened to data.max_tokens" in said) == (limit < max(len(c["ids"]) for c in whole))
        ids, owner, labels = batch["input_ids"], batch["document_ids"], batch["labels"]
        for row in range(len(ids)):
            for number in range(int(owner[row].max()) + 1):
                here = owner[row] == number
                assert (labels[row][here] >= 0).any()  # something to learn in each
                assert (ids[row][here] == 5).sum() == 1
                assert (ids[row][here] == 4).sum() == 2
                assert ids[row][here][0] == 1


def test_predicting_answers_needs_dialogues(tmp_path, instruct):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "words"}))
    assert documents(tmp_path / "a.jsonl", tmp_path / "out", instruct) == 0
    config = DocumentsConfig(
        sources={"a": [str(tmp_path / "out")]}, tokenizer=str(instruct), predict="answers"
    )
    with pytest.raises(ValueError, match="hold no dialogues"):
        documents_loader(config)
    config.predict = "some"
    with pytest.raises(ValueError, match="expected one of"):
        documents_loader(config)


def test_a_limit_that_leaves_nothing_is_one_sentence(tmp_path, instruct):
    source, out = conversations(tmp_path, 3), tmp_path / "out"
    assert documents(source, out, instruct, "--image-root", tmp_path / "pictures") == 0
    config = DocumentsConfig(sources={"a": [str(out)]}, tokenizer=str(instruct), max_tokens=16)
    with pytest.raises(ValueError, match="first answer beyond max_tokens=16"):
        documents_loader(config)


def test_special_tokens_of_the_template_are_kept(tmp_path):
    folder = byte_tokenizer(tmp_path / "tokenizer", CHATML, SPECIAL)
    stored.tokenizer, before = folder, stored.tokenizer
    try:
        talk = [{"from": "human", "value": "<image>a<|im_end|>"}, {"from": "gpt", "value": "b"}]
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "a.png").write_bytes(png((0, 0, 255)))
        (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "conversations": talk}))
        assert documents(tmp_path / "a.jsonl", tmp_path / "out", folder, "--image-root", tmp_path / "p") == 0
        ((text, content, _),) = stored(tmp_path / "out")
        assert text == (
            f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{F}{I}{F}a<|im_end|>\n"
            "<|im_start|>assistant\nb<|im_end|>\n"
        )
        assert answers(content) == ["b<|im_end|>"]
    finally:
        stored.tokenizer = before
