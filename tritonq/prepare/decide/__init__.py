"""What `prepare_qat` will do to a recorded model, decided before anything is changed."""
