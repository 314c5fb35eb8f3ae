"""Writes gpt2/: a tiny GPT-2 with tokenizer and chat template, and what transformers makes of it.

pip install torch transformers; python make_gpt2.py
"""

import json
import pathlib

import numpy as np
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent / 'gpt2'
TEXT = 'The cat sat on the mat, and the mat said: what a naïve cat! 你好 🎉\n\n'
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [
    {'role': 'system', 'content': 'Be a cat.'},
    {'role': 'user', 'content': 'What is 你好?'},
]


def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return t.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token='<|endoftext|>', eos_token='<|im_end|>',
        chat_template=TEMPLATE,
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    config = t.GPT2Config(
        vocab_size=288, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    net = t.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in net.parameters():  # norms and biases are 1 and 0 in a new model
            weight += 0.1 * torch.randn_like(weight)
    net.generation_config = t.GenerationConfig(
        eos_token_id=[2, 0], bos_token_id=0, do_sample=True, temperature=0.5, top_p=0.9
    )
    net.save_pretrained(HERE)
    torch.save(net.state_dict(), HERE / 'pytorch_model.bin')
    words = tokenizer()
    words.save_pretrained(HERE)
    ids = torch.tensor([words('The cat sat')['input_ids']])
    chat = words.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)
    chat = chat['input_ids'] if hasattr(chat, 'keys') else chat
    with torch.no_grad():
        made = ids
        for _ in range(32):
            made = torch.cat([made, net(made).logits[:, -1:].argmax(-1)], 1)
        np.savez_compressed(
            HERE / 'expected.npz',
            ids=ids.numpy(), logits=net(ids).logits.numpy(), greedy=made.numpy(),
            chat=np.array(chat), text=np.array(words(TEXT)['input_ids']),
            decoded=np.array(words.decode(made[0], skip_special_tokens=True)),
        )  # fmt: skip
    (HERE / 'messages.json').write_text(json.dumps(MESSAGES) + '\n')


if __name__ == '__main__':
    main()
