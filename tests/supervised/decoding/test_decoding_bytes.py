"""What decoding takes, told before it begins."""

from __future__ import annotations

import pytest

import layercomb as lc
from layercomb import models, tl, trees
from layercomb.supervised import decoding
from layercomb.transforms import buffers


def test_weights_and_caches_are_counted():
    net = models.GPT2(31, 16, n_layers=3, n_heads=2, max_len=64)
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))
    takes = decoding.decoding_bytes(model, 64)
    assert takes['weights'] == trees.n_bytes(model.weights)
    # Keys and values of 3 layers, float32, and where the rows stand.
    assert 0 <= takes['caches'] - 3 * 2 * 64 * 16 * 4 < 100
    more = decoding.decoding_bytes(model, 32)
    assert takes['caches'] - more['caches'] == 3 * 2 * 32 * 16 * 4


def test_the_process_is_left_out_where_the_system_does_not_tell(monkeypatch, tmp_path):
    net = models.GPT2(31, 16, n_layers=1, n_heads=2, max_len=64)
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))
    (tmp_path / 'statm').write_text('9 100000 9\n')
    monkeypatch.setattr(buffers, '_PAGES', tmp_path / 'statm')
    assert decoding.decoding_bytes(model, 8)['process'] > 100_000 * 4096 - 10**6
    monkeypatch.setattr(buffers, '_PAGES', tmp_path / 'none')
    assert decoding.decoding_bytes(model, 8).keys() == {'weights', 'caches'}


def test_what_cannot_decode_is_refused():
    with pytest.raises(TypeError, match=r'needs an lc\.Model with weights'):
        decoding.decoding_bytes(lc.Model(tl.Dense(3)), 8)
