"""Decide what `prepare_qat` will do to a recorded model, before anything is changed."""
