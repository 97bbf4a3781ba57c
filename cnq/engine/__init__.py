"""The only door to llama_cpp."""
