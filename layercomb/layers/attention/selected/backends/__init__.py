"""How selected attention is computed: sets of ranks, and XLA, a CPU or a GPU that reads them."""
