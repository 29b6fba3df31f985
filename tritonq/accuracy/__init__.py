"""What wins back accuracy: before training, after it, and instead of it."""
