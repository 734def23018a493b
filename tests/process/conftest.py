"""Real supervisor processes with a fake host, in a directory of the test's own."""

from support.supervised import instance, launch, port  # noqa: F401 (fixtures)
