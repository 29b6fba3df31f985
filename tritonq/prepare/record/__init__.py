"""What a model did in one run: its calls, and the values between them."""
