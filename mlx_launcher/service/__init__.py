"""The login service: what systemd and launchd are told, and how it is put there and taken away."""
