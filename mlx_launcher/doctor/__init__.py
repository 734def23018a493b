"""What may be wrong with an installation: one small module for each family of checks, each finding with its remedy."""
