"""Methods that win back accuracy: before training, after it, and instead of it. One file each."""
