"""What `mlx-launch bench` measures: requests to a server through its port, and the table that comes of it."""
