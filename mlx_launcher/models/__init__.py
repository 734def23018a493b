"""The files of a model directory: whole or not, how large, and which model they are. The standard library alone."""
