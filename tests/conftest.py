from hypothesis import settings

# No test says how long an example may take: the machine may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
