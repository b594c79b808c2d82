"""`adaptinfer.compile`: the decoder in captured CUDA graphs."""
