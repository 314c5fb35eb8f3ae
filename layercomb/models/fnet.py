"""FNet: an encoder that mixes positions by Fourier transforms instead of attention."""

from __future__ import annotations

from layercomb import layers as tl
from layercomb.checks import checked
from layercomb.models.bert import embeddings, encoder_head, post_norm_block, with_head


@checked
def FNet(
    vocab_size: int = 32000,
    d_model: int = 768,
    d_ff: int = 3072,
    n_layers: int = 12,
    max_len: int = 512,
    dropout: float = 0.0,
    head: str = 'masked_lm',
    n_classes: int | None = None,
    *,
    typed: bool = False,
    n_types: int = 4,
    activation: str | tl.Layer = 'gelu',
    epsilon: float = 1e-12,
    n_attention: int = 0,
    n_heads: int = 12,
) -> tl.Layer:
    """An encoder of token ids (B, L) whose blocks mix positions by `FourierMixing`.

    ::

        x = Norm(x + Re F_L F_D x)
        x = Norm(x + FeedForward(x))

    There is no mask: padding would be mixed in, so the sequences of a batch have one length.

    Args:
      vocab_size, d_model, d_ff, n_layers, max_len, dropout, head, n_classes: as of `BERT`.
      typed, n_types, activation, epsilon: as of `BERT`.
      n_attention: how many of the last blocks attend instead (the hybrid of the paper).
      n_heads: of these.

    Returns:
      ``Serial(embeddings, Repeat(block), head)``, perhaps with a tied head.

    Raises:
      ValueError: as `BERT`; or for more blocks that attend than there are.

    References:
      Lee-Thorp et al. 2021, https://arxiv.org/abs/2105.03824

    >>> FNet(64, 16, 32, n_layers=2, max_len=8).n_in
    1
    """
    if not 0 <= n_attention <= n_layers:
        raise ValueError(f'n_attention={n_attention}: {n_layers} blocks can attend at most')
    norm = tl.LayerNorm(epsilon)

    def blocks(name: str, mixing: tl.Layer, n: int) -> tl.Layer | None:
        block = post_norm_block(mixing, d_ff, d_model, activation, norm, dropout)
        return tl.Repeat(block.replace(name=name), n) if n else None

    attention = tl.SelfAttention(n_heads, causal=False, dropout=dropout)
    return with_head(
        embeddings(vocab_size, d_model, n_types, max_len, norm, dropout, typed, d_model=d_model),
        tl.Serial(
            blocks('block', tl.FourierMixing(), n_layers - n_attention),
            blocks('attention_block', attention, n_attention),
            name='blocks',
        ),
        encoder_head(
            head, vocab_size, d_model, d_model, n_classes, activation, norm, dropout, masked=False
        ),
    )
