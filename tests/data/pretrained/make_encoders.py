"""Writes the tiny encoders of this folder: random weights and outputs by transformers.

pip install torch transformers; python make_encoders.py
"""

import json
import pathlib

import numpy as np
import torch
import transformers as t

HERE = pathlib.Path(__file__).parent
SIZES = {
    'vocab_size': 40, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
    'max_position_embeddings': 12,
}  # fmt: skip
MADE = {
    'bert_masked_lm': (t.BertForMaskedLM, t.BertConfig, {'num_attention_heads': 2}),
    'bert_hidden': (
        t.BertModel, t.BertConfig, {'num_attention_heads': 2, 'hidden_act': 'gelu_new'},
    ),
    'bert_classes': (
        t.BertForSequenceClassification, t.BertConfig, {'num_attention_heads': 4, 'num_labels': 3},
    ),
    'roberta_masked_lm': (
        t.RobertaForMaskedLM, t.RobertaConfig, {'num_attention_heads': 2, 'type_vocab_size': 1},
    ),
    'roberta_classes': (
        t.RobertaForSequenceClassification, t.RobertaConfig,
        {'num_attention_heads': 2, 'type_vocab_size': 1},
    ),
    'albert_masked_lm': (
        t.AlbertForMaskedLM, t.AlbertConfig, {'num_attention_heads': 2, 'embedding_size': 8},
    ),
    'albert_classes': (
        t.AlbertForSequenceClassification, t.AlbertConfig,
        {'num_attention_heads': 2, 'embedding_size': 8, 'num_labels': 2},
    ),
    'fnet_masked_lm': (t.FNetForMaskedLM, t.FNetConfig, {}),
    'fnet_classes': (t.FNetForSequenceClassification, t.FNetConfig, {'num_labels': 3}),
}  # fmt: skip


def main() -> None:
    rng = np.random.default_rng(0)
    for name, (model, config, more) in MADE.items():
        torch.manual_seed(0)
        net = model(config(**SIZES, **more, initializer_range=0.3, pad_token_id=1)).eval()
        with torch.no_grad():
            for weight in net.parameters():  # norms and biases are 1 and 0 in a new model
                weight += 0.1 * torch.randn_like(weight)
        net.save_pretrained(HERE / name)
        ids = rng.integers(2, 40, (2, 8))
        inputs = {'input_ids': ids, 'token_type_ids': np.arange(16).reshape(2, 8) % 2}
        mask = np.ones((2, 8), int)
        if 'fnet' not in name:
            mask[1, 5:] = 0
            ids[1, 5:] = 1
            inputs['attention_mask'] = mask
        if 'roberta' in name:
            del inputs['token_type_ids']
        with torch.no_grad():
            outputs = net(**{key: torch.tensor(x) for key, x in inputs.items()})[0].numpy()
        np.savez_compressed(HERE / name / 'expected.npz', outputs=outputs, **inputs)
        keep = json.loads((HERE / name / 'config.json').read_text())
        (HERE / name / 'config.json').write_text(json.dumps(keep, indent=1) + '\n')


main()
