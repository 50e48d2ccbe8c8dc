"""A model as an ONNX graph with a KV cache: written, run and served without torch."""
