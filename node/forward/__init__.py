"""Forward-mode differentiation: derivatives along several directions beside the value."""
