"""The decisions carried out on a model, by one editor that can undo them."""
