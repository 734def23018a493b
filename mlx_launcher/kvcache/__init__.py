"""The KV cache on disk, as files: whole or set aside. No arrays here, and no mlx."""
