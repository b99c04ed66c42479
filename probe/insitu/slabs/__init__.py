"""Memory that taps write, made before the first step, and reading it back."""
