"""What runs inside a server process: the only code of ours that imports mlx."""
