"""Trees of rollouts: growing them, labelling their leaves."""
