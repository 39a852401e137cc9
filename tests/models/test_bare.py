"""The models where nothing but PyTorch, Triton and NumPy is installed, and on a PyTorch that lacks the fused loss."""

import subprocess
import sys

import torch
from interloom.models.idefics import loss as loss_module
from interloom.models.idefics.loss import language_model_loss

BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"safetensors", "tokenizers", "PIL", "huggingface_hub", *sys.argv[1:]}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import interloom.models as models
from interloom.models import GroupViTConfig, GroupViTModel
assert not {"interloom.models.idefics." + name for name in ("modeling", "causal_lm", "loss")} & set(sys.modules)
try:
    from interloom.models import GroupViTProcessor
except ImportError as error:
    print(error)
try:
    GroupViTModel.from_pretrained(".")
except ImportError as error:
    print(error)
except ValueError:
    pass
print(models.IdeficsForVisionText2Text.__name__)
try:
    models.Llama
except AttributeError as error:
    print(error)
"""


def test_groupvit_needs_no_idefics_and_what_is_absent_is_named():
    run = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "GroupViTProcessor needs the package PIL, which is not installed; install it with 'pip install pillow'.",
        "IdeficsForVisionText2Text",
        "module 'interloom.models' has no attribute 'Llama'",
    ]


def test_the_loss_is_the_same_where_pytorch_has_no_fused_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 16, generator=generator, requires_grad=True)
    weight = torch.randn(40, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 40, (150,), generator=generator)
    results = []
    for options in (loss_module.LinearCrossEntropyOptions, None):
        monkeypatch.setattr(loss_module, "LinearCrossEntropyOptions", options)
        sums = language_model_loss(hidden, weight, labels)
        plain = language_model_loss(hidden, weight, labels, want_z=False)
        assert float(plain.z) == 0.0 or options is None
        results.append((sums.nll, sums.z, *torch.autograd.grad(sums.nll + sums.z, (hidden, weight))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
