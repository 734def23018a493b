"""What a user can set, where it is kept, and what holds when nothing is set."""
