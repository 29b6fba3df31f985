"""What the emulator raises."""


class EmulatorError(Exception):
    """A launch did what no GPU is sure to do right, or what the emulator does not know."""
