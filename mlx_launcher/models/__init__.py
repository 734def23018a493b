"""Models: on this machine and on the hub, whole or not, what they need and who serves them. No mlx."""
