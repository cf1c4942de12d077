"""A trained model as files: in the form that the libraries load, where they have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from node.adapters import Adapter
from node.quantised import QuantisedLinear

# What it says is run by a test, with the base as `model` and the directory as `here`.
_README = """\
# What was trained on {source}

`trained.safetensors` holds the trained tensors alone, under their names in the model. Load the
base from where it came, with the same number of classes, as `model`, and then:

```python
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, linear

def adapted(module, inputs, y, t):
    h = gelu(linear(y, t["down.weight"], t["down.bias"]))
    return y + linear(h, t["up.weight"], t["up.bias"])

tensors = load_file(f"{{here}}/trained.safetensors")
for name in [n.split(".adapter.")[0] for n in tensors if n.endswith(".adapter.up.weight")]:
    t = {{n: tensors.pop(f"{{name}}.adapter.{{n}}") for n in {parts}}}
    model.get_submodule(name).register_forward_hook(lambda *args, t=t: adapted(*args, t))
model.load_state_dict(tensors, strict=False)
```

The tensors are fp32; so should the model be. A base that was quantised while it was trained gives
somewhat other numbers when it is not.
"""
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def save(
    model: nn.Module, tokenizer: Any, tensors: dict[str, torch.Tensor], source: str, to: Path
) -> None:
    """Save a model and its tokenizer.

    With LoRA, a peft adapter.  The trained tensors alone, and how to load them, if the
    base is quantised or has adapters in it, for which ``from_pretrained`` has no form;
    else the whole model.

    Args:
        model: as trained.
        tokenizer: of transformers.
        tensors: what was trained, by name.
        source: what the base was loaded from.
        to: a directory; it is made.
    """
    saved: Any = model
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the embedding was resized.
        saved.save_pretrained(str(to), save_embedding_layers=False)
    elif any(isinstance(module, QuantisedLinear | Adapter) for module in model.modules()):
        to.mkdir(parents=True, exist_ok=True)
        copies = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(copies, to / "trained.safetensors", {"format": "pt", "base": source})
        (to / "README.md").write_text(_README.format(source=source, parts=_PARTS))
    else:
        saved.save_pretrained(str(to))
    tokenizer.save_pretrained(str(to))
