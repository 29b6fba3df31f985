"""What quantization does to a model: a table of its layers (`summary`), and a page of measurements (`report`)."""
