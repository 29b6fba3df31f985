"""Record what a model does in one run: its calls of modules and functions, and the tensors that pass between them."""
