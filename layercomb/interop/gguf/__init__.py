"""Models in .gguf files, the format of llama.cpp."""
