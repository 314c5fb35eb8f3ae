"""People's own text as training data: rows of files and data sets, documents, packed batches.

`rows` finds rows, `turns` reads conversations in them, `answers` finds which tokens are weighted,
`documents` and `text` make sequences of `Document`s of these, `report` measures them, `packing` and
`batches` put several of them into each row of a batch.
"""
