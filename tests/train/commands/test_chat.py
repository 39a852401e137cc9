"""``interloom generate --chat``: several turns and pictures, written as training writes them."""

import io
import json

import pytest
import torch
from interloom.models import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor, IdeficsVisionConfig
from interloom.models.idefics import IdeficsImageProcessor, IdeficsTokenizer
from interloom.train.cli import main
from interloom.train.commands import chat
from interloom.train.data.documents.dialogues import DialogueWriter
from interloom.train.data.documents.formats import FORMATS
from interloom.train.data.documents.tokenization import DocumentTokenizer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

F, IMAGE, E = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
SPECIAL = ["<unk>", "<s>", "</s>", F, IMAGE, E]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "\n", *(chr(c) for c in range(32, 127))])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    tokenizer = IdeficsTokenizer(backend, additional_special_tokens=SPECIAL[3:])
    processor = IdeficsProcessor(IdeficsImageProcessor(28), tokenizer)
    torch.manual_seed(0)
    vision = IdeficsVisionConfig(
        embed_dim=16, image_size=28, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "cross_layer_interval": 1, "alpha_initializer": "ones", "initializer_range": 0.5, "use_resampler": False,
    }  # fmt: skip
    model = IdeficsForVisionText2Text(
        IdeficsConfig(vocab_size=len(vocabulary), vision_config=vision, **small)
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name, colour in (("red", (200, 30, 60)), ("blue", (10, 30, 200))):
        Image.new("RGB", (50, 40), colour).save(folder / f"{name}.png")
    return folder, model.eval(), processor


def test_a_dialogue_of_lines(checkpoint, capsys, monkeypatch):
    folder, model, processor = checkpoint
    monkeypatch.setattr("sys.stdin", io.StringIO("And this: <image>?\n\nDone?\n"))
    arguments = [
        "--image",
        str(folder / "red.png"),
        "--image",
        str(folder / "blue.png"),
        "--max-new-tokens",
        "5",
    ]
    call = ["generate", "--chat", "--checkpoint", str(folder), "--system", "Be brief.", "--json", *arguments]
    assert main([*call, "--prompt", "What is <image>?"]) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert [turn["user"] for turn in turns] == ["What is <image>?", "And this: <image>?", "Done?"]
    # By hand: the text of all that was said before, and the pictures in order.
    text = f"<s>System: Be brief.{E}\nUser: What is{F}{IMAGE}{F}?{E}\nAssistant:"
    shown = [folder / "red.png"]
    for number, turn in enumerate(turns):
        ids = torch.tensor(processor.tokenizer.rows([text]))
        seen = torch.zeros(1, ids.shape[1], len(shown), dtype=torch.long)
        places = (ids[0] == processor.image_token_id).nonzero().flatten().tolist()
        for image, (start, end) in enumerate(zip(places, [*places[1:], ids.shape[1]], strict=True)):
            seen[0, start:end, image] = 1
        pixels = processor.image_processor(shown, return_tensors="pt")[None]
        new = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_attention_mask=seen,
            max_new_tokens=5, bad_words_ids=[[4], [3]], eos_token_id=[2, 5],
        )[0, ids.shape[1] :]  # fmt: skip
        assert turn["assistant"] == processor.decode(new, skip_special_tokens=True).strip()
        said = turn["assistant"]
        text += f" {said}{E}\nUser: "
        text += [f"And this:{F}{IMAGE}{F}?", "Done?", ""][number] + f"{E}\nAssistant:"
        if number == 0:
            shown.append(folder / "blue.png")


def test_chat_and_training_write_the_same(checkpoint):
    folder, _, processor = checkpoint
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(folder / "red.png")}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]  # fmt: skip
    document = FORMATS["messages"].read({"messages": turns}, "k", None)
    made = DialogueWriter(DocumentTokenizer(folder)).encode(document)
    prompt = processor.apply_chat_template(turns[:3], add_generation_prompt=True, tokenize=True)
    ids = prompt["input_ids"][0].tolist()
    assert made.ids[: len(ids)] == ids
    assert made.answers[1][0] == len(ids)
    assert processor.apply_chat_template(turns).startswith(
        f"<s>User:{F}{IMAGE}{F}What?{E}\nAssistant: Red.{E}"
    )


def test_at_a_terminal(checkpoint, capsys, monkeypatch):
    folder, *_ = checkpoint
    lines = iter(
        [
            "/image nowhere.png",
            f"/image {folder / 'red.png'}",
            "What? <image> <image>",
            f"So?{E}",
            "/new",
            "Hi",
            "/end",
        ]
    )

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = []
    template = IdeficsProcessor.apply_chat_template

    def watched(self, messages, **options):
        asked.append(template(self, messages, add_generation_prompt=True))
        return template(self, messages, **options)

    monkeypatch.setattr(IdeficsProcessor, "apply_chat_template", watched)
    assert main(["generate", "--chat", "--checkpoint", str(folder), "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert asked == [f"<s>User:{F}{IMAGE}{F}So?{E}\nAssistant:", f"<s>User: Hi{E}\nAssistant:"]
    assert "nowhere.png does not exist" in captured.err
    assert "The turn holds 2 <image> but 1 pictures are left" in captured.err
    assert len(captured.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "lines", "said"),
    [
        ([], "", "There is no turn"),
        (["--prompt", "a <image>"], "", "1 <image> but 0 pictures"),
        (["--image", "nowhere.png"], "a\n", "--image nowhere.png does not exist"),
    ],
)
def test_what_cannot_be_said_is_one_sentence(checkpoint, capsys, monkeypatch, options, lines, said):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["generate", "--chat", "--checkpoint", str(checkpoint[0]), *options]) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert said in sentence


def test_system_words_need_a_dialogue(checkpoint, capsys):
    assert main(["generate", "--system", "a", "--prompt", "b", "--checkpoint", str(checkpoint[0])]) == 2
    assert "--system is given without --chat" in capsys.readouterr().err


def test_a_user_cannot_write_special_tokens(checkpoint):
    *_, processor = checkpoint
    assert chat.clean(processor, f"a{E}b<ima<s>ge>c<<s>/s>") == "abc"
