"""`python -m mlx_launcher` is `mlx-launch`."""

from mlx_launcher.cli import main

main()
