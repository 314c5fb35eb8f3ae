"""Writes peft/: adapters as PEFT writes them, and what PEFT and transformers compute with them.

    python tests/data/pretrained/make_peft.py

It needs torch, transformers and peft. Models are those of make_decoders.py and the encoder in
bert_classes/; weights of adapters follow from their names, as there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from make_decoders import CASES as MODELS
from make_decoders import token_ids, values

FOLDER = Path(__file__).with_name('peft')
KEPT = 3  # the last positions, whose logits are recorded
GPT2 = {'vocab_size': 29, 'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'n_positions': 64}
CAUSAL = {'task_type': 'CAUSAL_LM', 'lora_dropout': 0.1}
# By name: the model, and the configuration of the adapter.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    'llama': ('llama', {**CAUSAL, 'target_modules': 'all-linear', 'r': 3, 'lora_alpha': 6}),
    'llama_dora': (
        'llama',
        {
            **CAUSAL,
            'target_modules': ['q_proj', 'o_proj', 'up_proj', 'down_proj'],
            'r': 2,
            'lora_alpha': 5,
            'use_dora': True,
            'use_rslora': True,
        },
    ),
    'llama_patterns': (
        'llama',
        {
            **CAUSAL,
            'target_modules': ['q_proj', 'gate_proj', 'up_proj'],
            'r': 2,
            'lora_alpha': 4,
            'use_rslora': True,
            'layers_to_transform': [1],
            'rank_pattern': {'gate_proj': 4, 'layers.1.self_attn.q_proj': 3},
            'alpha_pattern': {'up_proj': 7},
        },
    ),
    'phi3': ('phi3', {**CAUSAL, 'target_modules': 'all-linear', 'r': 2, 'lora_alpha': 3}),
    'gpt2': (
        'gpt2',
        {
            **CAUSAL,
            'target_modules': ['c_attn', 'c_fc', 'c_proj'],
            'r': 2,
            'lora_alpha': 4,
            'use_dora': True,
            'fan_in_fan_out': True,
        },
    ),
    'bert': (
        'bert_classes',
        {
            'task_type': 'SEQ_CLS',
            'target_modules': ['query', 'value'],
            'r': 2,
            'lora_alpha': 4,
        },
    ),
}


def base_model(name: str) -> Any:
    """The model that an adapter is for, with weights that follow from their names."""
    import torch
    import transformers as t

    if name == 'bert_classes':
        return t.AutoModelForSequenceClassification.from_pretrained(FOLDER.with_name(name)).eval()
    kind, entries = ('gpt2', GPT2) if name == 'gpt2' else MODELS[name]
    config = t.AutoConfig.for_model(kind, **json.loads(json.dumps(entries)))
    config._attn_implementation = 'eager'
    model = t.AutoModelForCausalLM.from_config(config).eval()
    filled(torch, model.named_parameters())
    return model


def filled(torch: Any, named: Any) -> None:
    """Gives parameters the values of their names."""
    with torch.no_grad():
        for name, x in named:
            x.copy_(torch.tensor(values(name, tuple(x.shape))))


def logits_of(model: Any) -> np.ndarray:
    """What a model answers to the tokens of the test."""
    import torch

    ids = token_ids(29)
    with torch.no_grad():
        if 'Classification' in type(getattr(model, 'base_model', model)).__name__ or hasattr(
            model.config, 'type_vocab_size'
        ):
            return model(torch.tensor(ids[:, :8].astype(np.int64))).logits.numpy()
        made = model(torch.tensor(ids.astype(np.int64)), use_cache=False).logits
    return made[:, -KEPT:].numpy()


def write(case: str) -> None:
    """Writes the adapter of one case, and what it computes."""
    import torch
    from peft import LoraConfig, get_peft_model

    name, entries = CASES[case]
    base = base_model(name)
    before = logits_of(base)
    model = get_peft_model(base, LoraConfig(**entries)).eval()
    adapted = [
        (n, x) for n, x in model.named_parameters() if 'lora_' in n or 'modules_to_save' in n
    ]
    with torch.no_grad():
        for n, x in adapted:
            drawn = torch.tensor(values(n, tuple(x.shape)))
            if 'magnitude' in n:  # near the norms that it begins with
                x.mul_(1 + drawn)
            else:
                x.copy_(drawn)
    out = FOLDER / case
    for config in model.peft_config.values():  # without the folders of this machine
        base = config.base_model_name_or_path
        config.base_model_name_or_path = base and Path(base).name
    model.save_pretrained(out)
    (out / 'README.md').unlink(missing_ok=True)
    after = logits_of(model)
    np.savez_compressed(out / 'expected.npz', before=before, after=after)
    assert np.abs(after - before).max() > 0.05


if __name__ == '__main__':
    for case in CASES:
        write(case)
    (FOLDER / 'gpt2.json').write_text(base_model('gpt2').config.to_json_string(use_diff=False))
