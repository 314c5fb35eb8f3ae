"""Reading prompts: a fresh decoding state, and the model over prompts in parts."""
